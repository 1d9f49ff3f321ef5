// The neurons: which are shown, in which order, and the few rows that are on the screen.
const ROW = 30, TALLEST = 12e6;

class Neurons {
  // All neurons: their numbers by column, their layers, ranks, pages.
  static async load() {
    const made = new Neurons();
    const [levels, pages, flags, ...columns] = await Promise.all([
      unpack(DATA.bars.levels), unpack(DATA.pages), DATA.flags && unpack(DATA.flags),
      ...DATA.columns.map((column) => unpack(column.data))]);
    made.levels = levels;
    made.flags = flags;
    made.columns = DATA.columns.map((column, i) => ({ ...column, values: columns[i], data: null, decimals: decimalsOf(columns[i]) }));
    made.starts = [0];
    for (const layer of DATA.layers) made.starts.push(made.starts[made.starts.length - 1] + layer.n);
    made.n = made.starts[made.starts.length - 1];
    made.layerOf = new Uint32Array(made.n);
    DATA.layers.forEach((_, l) => made.layerOf.fill(l, made.starts[l], made.starts[l + 1]));
    made.pageOf = new Map(Array.from(pages, (row, page) => [row, page]));
    made.byName = new Map(DATA.layers.map((layer, l) => [layer.name, l]));
    made.orders = new Map();
    made.rank = new Uint32Array(made.n);
    const seen = new Uint32Array(DATA.layers.length);
    for (const row of made.order("wd", true)) made.rank[row] = ++seen[made.layerOf[row]];
    return made;
  }
  column(name) { return this.columns.find((one) => one.name === name); }
  neuron(row) { return row - this.starts[this.layerOf[row]]; }
  row(layer, neuron) {
    const l = this.byName.get(layer);
    return l === undefined || !(neuron >= 0 && neuron < DATA.layers[l].n) ? -1 : this.starts[l] + neuron;
  }
  flag(row) { return this.flags ? this.flags.texts[this.flags.codes[row]] : ""; }
  address(row) { return `#${encodeURIComponent(DATA.layers[this.layerOf[row]].name)}/${this.neuron(row)}`; }
  order(name, descending) {
    const key = `${name} ${descending}`;
    if (!this.orders.has(key)) {
      if (this.orders.size > 8) this.orders.delete(this.orders.keys().next().value);
      let values = this.column(name)?.values;
      if (!values) {
        values = new Float32Array(this.n);
        for (let row = 0; row < this.n; row++) values[row] = name === "neuron" ? this.neuron(row) : row;
      }
      this.orders.set(key, sortedPlaces(values, descending));
    }
    return this.orders.get(key);
  }
}

function decimalsOf(values) {
  const step = Math.max(1, Math.floor(values.length / 5000)), size = [];
  for (let i = 0; i < values.length; i += step) if (Number.isFinite(values[i])) size.push(Math.abs(values[i]));
  const large = size.sort((a, b) => a - b)[Math.floor(size.length * 0.99)] || 0;
  if (!large) return 1;
  const decimals = 3 - Math.floor(Math.log10(large));
  return decimals > 7 || decimals < -3 ? null : Math.min(4, Math.max(0, decimals));
}

// What is searched: a list of tests of a row, from words.
const COMPARE = { "<": (a, b) => a < b, ">": (a, b) => a > b, "<=": (a, b) => a <= b, ">=": (a, b) => a >= b };
// Equal to so many digits as are written.
const written = (text) => {
  const [, digits, power] = text.match(/^[+\-−]?\d*\.?(\d*)(?:e([+-]?\d+))?$/iu) ?? [];
  return 0.5 * 10 ** ((Number(power) || 0) - (digits ?? "").length) * (1 + 1e-9);
};

async function testsOf(text, neurons, wordsOf) {
  const tests = [];
  for (const [, quoted, curly, plain] of text.matchAll(/"([^"]*)"?|“([^”]*)”?|(\S+)/gu)) {
    const word = quoted ?? curly ?? plain;
    if (!word) continue;
    const comparison = plain === undefined ? null : plain.match(/^([a-z_±+>0 ]+?)(<=|>=|<|>|=)([+\-−]?[\d.]+(?:e[+-]?\d+)?)$/iu);
    if (comparison) {
      const [, name, sign, value] = comparison;
      const column = neurons.columns.find((one) => one.name === name.toLowerCase() || one.title.toLowerCase() === name.toLowerCase());
      if (!column) throw new Error(`There is no number called “${name}”. There are: ${neurons.columns.map((one) => one.name).join(", ")}.`);
      const wanted = Number(value.replace("−", "-")), near = written(value);
      const compare = COMPARE[sign] ?? ((a, b) => Math.abs(a - b) <= near);
      tests.push((row) => compare(column.values[row], wanted));
      continue;
    }
    const named = plain === undefined ? null : plain.match(/^(block|flag|layer):(.*)$/iu);
    if (named) {
      const part = named[1].toLowerCase(), wanted = named[2].toLowerCase();
      tests.push(part === "block" ? (row) => String(DATA.layers[neurons.layerOf[row]].block) === wanted
        : part === "flag" ? (row) => neurons.flag(row) === wanted
          : (row) => DATA.layers[neurons.layerOf[row]].name.toLowerCase().includes(wanted));
      continue;
    }
    if (plain !== undefined && /^\d+$/u.test(plain)) {
      const wanted = Number(plain);
      tests.push((row) => neurons.neuron(row) === wanted);
      continue;
    }
    const wanted = word.toLowerCase(), layers = DATA.layers.map((layer) => plain !== undefined && layer.name.toLowerCase().includes(wanted));
    const pages = await wordsOf();
    const holds = pages.map((words) => words.includes(wanted));
    tests.push((row) => layers[neurons.layerOf[row]] || (neurons.pageOf.has(row) && holds[neurons.pageOf.get(row)]));
  }
  return tests;
}

class Grid {
  constructor(host, neurons, open) {
    Object.assign(this, { host, neurons, open, sort: "wd", descending: true, at: 0, rows: [], pool: [], tests: [], layer: -1 });
    this.head = el("div", { cls: "row head", role: "row" });
    this.sizer = el("div", { cls: "sizer", role: "presentation" });
    host.append(this.head, this.sizer);
    this.titles();
    host.addEventListener("scroll", () => this.draw(), { passive: true });
    new ResizeObserver(() => this.draw()).observe(host);
    document.addEventListener("theme", () => { this.inks = null; this.draw(); });
  }
  titles() {
    const wide = this.neurons.columns.map((c) => `minmax(${Math.max(62, c.title.length * 9 + 18)}px, 96px)`).join(" ");
    this.host.style.setProperty("--columns", `minmax(150px, 1.2fr) 104px ${wide} ${this.neurons.flags ? "80px" : ""}`);
    const title = (name, text, help, cls) => el("button", { type: "button", role: "columnheader", cls, title: help, "data-name": name,
      on: { click: () => this.sortBy(name) } }, text, el("span", { cls: "arrow", "aria-hidden": "true" }));
    this.head.append(title("neuron", "neuron", "index in its layer", "name"), el("span", { cls: "bars", role: "columnheader" }, "outputs"),
      ...this.neurons.columns.map((c, i) => title(c.name, c.title, c.help + (c.unit ? `, in ${c.unit}` : ""), i < 1 ? "first" : "")));
    if (this.neurons.flags) this.head.append(el("span", { cls: "flag", role: "columnheader" }, "flag"));
  }
  sortBy(name, descending) {
    this.descending = descending ?? (name === this.sort ? !this.descending : name !== "neuron");
    this.sort = name;
    this.refresh();
  }
  refresh() {
    const { neurons, tests, layer } = this, order = neurons.order(this.sort, this.descending);
    let kept = order;
    if (tests.length || layer >= 0) {
      kept = new Uint32Array(order.length);
      let count = 0;
      for (let i = 0; i < order.length; i++) {
        const row = order[i];
        if (layer >= 0 && neurons.layerOf[row] !== layer) continue;
        let fits = true;
        for (let t = 0; fits && t < tests.length; t++) fits = tests[t](row);
        if (fits) kept[count++] = row;
      }
      kept = kept.subarray(0, count);
    }
    this.rows = kept;
    this.at = 0;
    for (const button of this.head.querySelectorAll("button")) {
      const own = button.dataset.name === this.sort;
      button.setAttribute("aria-sort", own ? (this.descending ? "descending" : "ascending") : "none");
      button.querySelector(".arrow").textContent = own ? (this.descending ? " ▼" : " ▲") : "";
    }
    for (const cell of this.host.querySelectorAll("[data-column]")) cell.classList.toggle("sorted", cell.dataset.column === this.sort);
    for (const cell of this.head.children) cell.classList.toggle("sorted", cell.dataset.name === this.sort);
    this.host.setAttribute("aria-rowcount", kept.length + 1);
    this.sizer.style.height = `${Math.min(TALLEST, kept.length * ROW)}px`;
    this.host.scrollTop = 0;
    this.draw();
    this.changed?.();
  }
  // Rows lie evenly in a box of limited height: browsers have none taller than some ten million pixels.
  first() {
    const seen = this.seen(), most = Math.max(0, this.rows.length - seen);
    if (this.rows.length * ROW <= TALLEST) return Math.min(most, Math.floor(this.host.scrollTop / ROW));
    const reach = this.sizer.offsetHeight + ROW - this.host.clientHeight;
    return Math.min(most, Math.round(this.host.scrollTop / reach * most));
  }
  seen() { return Math.max(1, Math.floor((this.host.clientHeight - ROW) / ROW)); }
  draw() {
    if (!this.host.clientHeight) return;
    const short = this.rows.length * ROW <= TALLEST, first = this.first();
    const top = short ? first * ROW : this.host.scrollTop, count = Math.min(this.seen() + 2, this.rows.length - first);
    this.inks ??= { bar: color("--bar"), curve: color("--curve") };
    while (this.pool.length < count) this.pool.push(this.makeRow());
    this.pool.forEach((line, i) => {
      line.node.hidden = i >= count;
      if (i < count) this.fill(line, first + i, top + i * ROW);
    });
  }
  makeRow() {
    const link = el("a", { tabindex: "-1" }), dot = el("span", { cls: "dot" }), layer = el("bdi", {}), canvas = el("canvas", { "aria-hidden": "true" });
    const cells = this.neurons.columns.map((c, i) => el("span", { role: "gridcell", cls: i < 1 ? "first" : "", "data-column": c.name }));
    const flag = el("span", { role: "gridcell", cls: "flag" });
    link.append(dot, layer);
    const node = el("div", { cls: "row", role: "row" }, el("span", { role: "gridcell", cls: "name" }, link), el("span", { cls: "bars", role: "gridcell" }, canvas), cells, this.neurons.flags && flag);
    const line = { node, link, dot, layer, canvas, cells, flag, place: -1 };
    node.addEventListener("click", (event) => { if (!event.target.closest("a")) this.open(this.rows[line.place]); });
    this.sizer.append(node);
    for (const cell of cells) cell.classList.toggle("sorted", cell.dataset.column === this.sort);
    return line;
  }
  fill(line, place, top) {
    const row = this.rows[place], { neurons } = this, layer = DATA.layers[neurons.layerOf[row]];
    line.place = place;
    line.node.style.transform = `translateY(${top}px)`;
    line.node.setAttribute("aria-rowindex", place + 2);
    line.node.classList.toggle("at", place === this.at);
    line.node.classList.toggle("odd", place % 2 === 1);
    line.link.href = neurons.address(row);
    line.link.title = `${layer.name}, neuron ${neurons.neuron(row)}`;
    line.layer.textContent = `${layer.label} · ${neurons.neuron(row)}`;
    line.dot.classList.toggle("none", !neurons.pageOf.has(row));
    smallBars(line.canvas, neurons.levels, row * DATA.bars.n, DATA.bars.n, this.inks);
    neurons.columns.forEach((column, i) => {
      const value = column.values[row];
      line.cells[i].textContent = column.decimals === null ? number(value) : fixed(value, column.decimals);
    });
    if (neurons.flags) line.flag.textContent = neurons.flag(row);
  }
  move(step) {
    if (!this.rows.length) return;
    this.at = Math.min(this.rows.length - 1, Math.max(0, this.at + step));
    const first = this.first(), seen = this.seen(), most = Math.max(1, this.rows.length - seen);
    const wanted = this.at < first ? this.at : this.at >= first + seen ? this.at - seen + 1 : first;
    if (wanted !== first) {
      const short = this.rows.length * ROW <= TALLEST;
      this.host.scrollTop = short ? wanted * ROW : wanted / most * (this.sizer.offsetHeight + ROW - this.host.clientHeight);
    }
    this.draw();
  }
  key(event) {
    const page = this.seen() - 1, steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -this.rows.length, End: this.rows.length };
    if (event.key in steps) this.move(steps[event.key]);
    else if (event.key === "Enter" && this.rows.length) this.open(this.rows[this.at]);
    else return false;
    return true;
  }
}
