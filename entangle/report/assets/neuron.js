// The page of one neuron.
class NeuronPage {
  constructor(host, neurons, grid) {
    Object.assign(this, { host, neurons, grid, row: -1, logarithmic: false, redraws: [] });
    this.tables = Object.fromEntries(Object.entries(DATA.tables).map(([name, packed]) => [name, new Table(packed)]));
    let width = 0;
    new ResizeObserver(() => {
      if (host.clientWidth === width || host.hidden) return;
      width = host.clientWidth;
      this.redraws.forEach((redraw) => redraw());
    }).observe(host);
  }
  async rows(name) { return this.page === undefined || !this.tables[name] ? [] : this.tables[name].rows(this.page); }

  async show(row) {
    const { neurons } = this;
    this.row = row;
    this.page = neurons.pageOf.get(row);
    this.layer = DATA.layers[neurons.layerOf[row]];
    const names = ["modes", "contexts", "windows", "pairs", "near", "tokens", "experts", "outputs", "ablated"];
    const found = Object.fromEntries(await Promise.all(names.map(async (name) => [name, await this.rows(name)])));
    this.text ??= DATA.text && { ids: await unpack(DATA.text.ids), words: (await unpack(DATA.text.words)) };
    if (row !== this.row) return;
    this.redraws = [];
    const bars = await this.bars(), whole = this.page !== undefined;
    this.host.replaceChildren(el("div", {}, this.heading(), !whole && el("p", { cls: "note missing" }, this.told(DATA.missing.page)),
      el("div", { cls: "two" }, el("div", {}, this.distribution(bars, found.modes, whole), this.standing()), this.numbers()),
      whole && DATA.elsewhere.map((note) => el("p", { cls: "note" }, this.told(note))), whole && this.sent(),
      whole && [this.modes(found), this.contexts(found), this.ends(found), this.pairs(found), this.experts(found)], whole && this.ablation(found)));
    this.redraws.forEach((redraw) => redraw());
  }

  // Of an expert's neuron: on how many tokens it is read.
  sent() {
    const { sent } = this.layer;
    return typeof sent === "number" && el("p", { cls: "note" }, `The router sends this expert ${counted(sent)} of the text's ${counted(DATA.text.tokens)} tokens (${number(100 * sent / DATA.text.tokens, 3)} %). Modes, contexts and pairs are of these. `,
      "On the others it puts out nothing: in contexts they are ", el("span", { cls: "t unseen" }, "grey and underlined"), ".");
  }
  told(text) { return text.split("`").map((part, i) => i % 2 ? el("code", {}, part) : part); }
  part(title, ...children) { return el("section", {}, el("h2", {}, title), children); }
  lacks(name) {
    const { why } = this.layer, unread = why && ["modes", "contexts", "pairs"].includes(name);
    return el("p", { cls: "note missing" }, this.told(unread ? `Not read from the model: ${why}.` : DATA.missing[name]));
  }
  value(name) { const column = this.neurons.column(name); return column ? column.values[this.row] : NaN; }

  heading() {
    const { neurons, row, layer, grid } = this, place = grid.rows.indexOf(row), flag = neurons.flag(row);
    const step = (by, text, hint) => {
      const next = place < 0 ? undefined : grid.rows[place + by];
      return next === undefined ? el("span", { cls: "step off" }, text) : el("a", { cls: "step", href: neurons.address(next), title: hint, "data-step": by }, text);
    };
    const score = this.value("wd"), ranked = score === score;
    return el("div", { cls: "neuron-head" },
      el("p", { cls: "way" }, el("a", { href: "#" }, "← all neurons"), " ", step(-1, "‹ before", "←"), step(1, "after ›", "→"),
        place >= 0 && el("span", { cls: "quiet" }, `${counted(place + 1)} of ${counted(grid.rows.length)} in the table`)),
      el("h2", { cls: "title" }, el("a", { href: `#${encodeURIComponent(layer.name)}/` }, el("bdi", {}, layer.name)), ` · neuron ${neurons.neuron(row)}`),
      el("p", { cls: "score" }, el("b", {}, `WD ${number(score)}`), ` ± ${number(this.value("wd_se"), 2)} σ, `,
        ranked ? `rank ${counted(neurons.rank[row])} of ${counted(layer.n)} in its layer, ` : "no rank, ",
        `null floor ${number(layer.floor, 2)} σ`, ranked && layer.floor > 0 && ` (${number(score / layer.floor, 3)} times the floor)`,
        flag && el("b", { cls: "flagged" }, ` ${flag}`)));
  }

  async bars() {
    if (this.page === undefined) {
      const { n, span } = DATA.bars, start = this.row * n, width = 2 * span / n;
      return Array.from({ length: n }, (_, i) => ({ left: -span + i * width, right: -span + (i + 1) * width, count: this.neurons.levels[start + i] }));
    }
    this.exact ??= Object.fromEntries(await Promise.all(Object.entries(DATA.exact).map(async ([name, packed]) => [name, await unpack(packed)])));
    const { edges, starts, counts, first, location, scale, low, high } = this.exact, p = this.page;
    const own = counts.subarray(starts[p], starts[p + 1]), last = own.length - 1;
    const edge = (i) => i === 0 ? low[p] : i > last ? high[p] : location[p] + scale[p] * edges[first[p] + i - 1];
    return Array.from(own, (count, i) => ({ left: edge(i), right: edge(i + 1), count }));
  }

  distribution(bars, modes, whole) {
    const host = el("div", { cls: "chart" }), steady = !(this.value("std") > 0);
    const draw = () => distribution(host, bars, { modes, logarithmic: this.logarithmic, label: steady ? "output (it does not vary)" : undefined });
    this.redraws.push(draw);
    const box = el("input", { type: "checkbox", id: "log", on: { change: (event) => { this.logarithmic = event.target.checked; draw(); } } });
    box.checked = this.logarithmic;
    return this.part("Outputs", host, el("p", { cls: "quiet small" }, el("label", { cls: "check" }, box, "logarithmic"), " · ",
      whole ? `${counted(this.layer.tokens)} ${this.layer.tokens < this.layer.of ? `of the text's ${counted(this.layer.of)} tokens` : "tokens"}; the line is the Gaussian of the same mean and deviation.`
        : "small histogram: heights in 63 steps, what lies beyond ±4 σ is in the outer bars."));
  }

  standing() {
    const host = el("div", { cls: "chart" }), { neurons } = this, l = neurons.layerOf[this.row];
    const values = neurons.column("wd").values.subarray(neurons.starts[l], neurons.starts[l + 1]);
    this.redraws.push(() => standing(host, values, this.value("wd"), this.layer.floor, "WD of the layer's neurons", "WD, in σ"));
    return this.part("Among the neurons of its layer", host);
  }

  numbers() {
    const { neurons } = this, l = neurons.layerOf[this.row], from = neurons.starts[l], to = neurons.starts[l + 1];
    const lines = neurons.columns.map((column) => {
      const own = column.values[this.row];
      let below = 0, known = 0;
      for (let i = from; i < to; i++) { const v = column.values[i]; if (v === v) { known++; if (v < own) below++; } }
      return el("tr", {}, el("td", { cls: "text", title: column.help }, column.title), el("td", {}, column.name === "positive" ? `${number(100 * own, 3)} %` : number(own)),
        el("td", { cls: "quiet" }, own === own && known > 1 ? `${Math.floor(100 * below / (known - 1))} %` : "–"), el("td", { cls: "text quiet help" }, column.help));
    });
    return this.part("Numbers", el("div", { cls: "wide" }, el("table", { cls: "plain numbers" }, el("thead", {}, el("tr", {}, el("th", { cls: "text" }, ""), el("th", {}, "value"), el("th", { title: "share of its layer's neurons with a smaller value" }, "below"), el("th", { cls: "text help" }, "meaning"))), el("tbody", {}, lines))),
      el("p", { cls: "quiet small" }, "“below”: share of the layer's neurons with a smaller value. Numbers are kept to 16 significant bits."));
  }

  word(i) { const { ids, words } = this.text; return words.texts[words.codes[ids[i]]]; }
  token(text) { return el("span", { cls: "tok" }, el("bdi", {}, text)); }

  // A place in the text, each token in the shade of its output where that is known.
  window(place, before, after, shades) {
    const cells = [];
    for (let i = -before; i <= after; i++) {
      const shade = shades ? shades(i) : 0;
      cells.push(el("span", { cls: `t ${shade === DATA.text.unseen ? "unseen" : shade < 0 ? `l${-shade}` : `h${shade}`}${i === 0 ? " it" : ""}` }, this.word(place + i)));
    }
    return el("span", { cls: "context", dir: "auto" }, cells);
  }
  strings(before, token, after) { return el("span", { cls: "context", dir: "auto" }, el("bdi", {}, before), el("mark", {}, el("bdi", {}, token)), el("bdi", {}, after)); }
  example(output, body) { return el("li", {}, el("span", { cls: "out" }, signed(output)), body); }
  shaded(row) { return this.example(row.output, this.window(row.place, row.before, row.after, (i) => row[`s${i + DATA.text.window}`])); }

  modes({ modes, contexts, windows }) {
    if (!modes.length) return this.part("Modes", this.lacks("modes"));
    return this.part(modes.length === 1 ? "One mode" : `${modes.length} modes`, modes.map((mode, i) => {
      const own = windows.filter((one) => one.group === `mode ${mode.mode}`).map((one) => this.shaded(one));
      const kept = own.length ? own : contexts.filter((one) => one.mode === mode.mode).map((one) => this.example(one.output, this.strings(one.before, one.token, one.after)));
      const tokens = JSON.parse(mode.top_tokens).map(([token, count]) => el("span", { cls: "chip", title: `${counted(count)} times` }, this.token(token), el("small", {}, ` ${counted(count)}`)));
      return el("div", { cls: `mode m${i % 6}` }, el("h3", {}, `Mode ${mode.mode}`, el("span", { cls: "quiet" }, ` around ${signed(mode.center)} σ, ${number(100 * mode.share, 3)} % of ${typeof this.layer.sent === "number" ? "its" : "the"} tokens (${counted(mode.tokens)})`)),
        el("p", { cls: "chips" }, tokens), kept.length ? el("ul", { cls: "contexts" }, kept) : this.lacks("contexts"));
    }));
  }

  contexts({ windows }) {
    const groups = [];
    for (const row of windows) if (!row.group.startsWith("mode ")) {
      if (groups.at(-1)?.[0] !== row.group) groups.push([row.group, []]);
      groups.at(-1)[1].push(row);
    }
    if (!groups.length) return DATA.text || !DATA.tables.contexts ? this.part("Contexts by output", this.lacks("contexts")) : null;
    const name = (group) => group === "largest" || group === "smallest" ? `${group} outputs` : group === "median" ? "at the median" : `at the ${group} quantile`;
    return this.part("Contexts by output", el("p", { cls: "quiet small" }, "Outputs in σ from the mean. Each token in the shade of its own output: ",
      el("span", { cls: "legend" }, [-7, -5, -3, -1, 0, 1, 3, 5, 7].map((s) => el("span", { cls: `t ${s < 0 ? `l${-s}` : `h${s}`}` }, s === -7 ? "≤ −16" : s === 7 ? "≥ 16" : fixed(Math.sinh(s / 2), 1).replace(".0", ""))))),
    ["ends", "middle"].map((kind) => el("div", { cls: `groups ${kind}` }, groups.filter(([group]) => (kind === "ends") === group.endsWith("est"))
      .map(([group, rows]) => el("div", { cls: "group" }, el("h3", {}, name(group)), el("ul", { cls: "contexts" }, rows.map((row) => this.shaded(row))))))));
  }

  ends({ tokens, windows }) {
    if (!tokens.length) return windows.length && DATA.missing.tokens ? this.part("Tokens by mean output", this.lacks("tokens")) : null;
    const list = (end, title) => el("div", { cls: "group" }, el("h3", {}, title), el("table", { cls: "plain" }, el("tbody", {}, tokens.filter((one) => one.end === end).map((one) =>
      el("tr", {}, el("td", {}, `${signed(one.mean)} σ`), el("td", { cls: "text" }, this.token(one.token)), el("td", { cls: "quiet" }, `${counted(one.count)} times`))))));
    return this.part("Tokens by mean output", el("div", { cls: "groups" }, list(1, "largest"), list(0, "smallest")));
  }

  pairs({ pairs, near }) {
    if (!pairs.length && !near.length) return this.part("Near in, far out", this.lacks("pairs"));
    const side = (row, s) => row[`place_${s}`] === undefined ? this.strings(row[`before_${s}`], row[`token_${s}`], row[`after_${s}`]) : this.window(row[`place_${s}`], row[`before_${s}`], row[`after_${s}`]);
    const all = (near.length ? near : pairs).map((row) => el("li", {}, el("p", { cls: "quiet small" }, `${number(row.output_distance, 3)} σ apart, inputs ${number(row.input_distance, 3)} apart, cosine ${number(row.cosine, 3)}`),
      el("ul", { cls: "contexts" }, this.example(row.output_a, side(row, "a")), this.example(row.output_b, side(row, "b")))));
    const list = (rows) => el("ul", { cls: "pairs" }, rows), more = all.length - 6;
    return this.part("Near in, far out", el("p", { cls: "quiet small" }, "Two tokens whose inputs to the layer are among the nearest 1 % of pairs, and whose outputs this neuron puts farthest apart."),
      list(all.slice(0, 6)), more > 0 && el("details", {}, el("summary", {}, `${more} more`), list(all.slice(6))));
  }

  experts({ experts, outputs }) {
    if (!experts.length) return this.part("Experts", this.lacks("experts"));
    const titles = { run: "run", experts: "experts", router: "router", sparsity: "zeros", ri: "RI", rmse: "RMSE", output_wd: "WD from dense", wd: "WD", weighted_wd: "WD in clusters", md: "MD", weighted_md: "MD in clusters", smallest_cluster: "smallest cluster" };
    const shown = Object.keys(titles).filter((name) => experts.some((row) => row[name] !== "" && row[name] === row[name]) && (name !== "run" || new Set(experts.map((row) => row.run)).size > 1));
    const cell = (name, value) => el("td", { cls: typeof value === "string" ? "text" : "" }, typeof value === "string" ? value : name === "sparsity" ? `${number(100 * value, 4)} %` : number(value));
    const charts = [], dense = outputs.filter((row) => row.kind === "dense"), first = dense[0]?.experts;
    const drawn = [...new Set(outputs.map((row) => row.experts))];
    if (drawn.length) {
      const host = el("div", { cls: "chart" }), bars = dense.filter((row) => row.experts === first);
      const lines = [drawn[0], drawn.at(-1)].filter((k, i, all) => all.indexOf(k) === i).map((k, i) => ({ shade: i, k, bars: outputs.filter((row) => row.kind === "sparse" && row.experts === k) }));
      this.redraws.push(() => distribution(host, bars, { lines, height: 220 }));
      charts.push(host, el("p", { cls: "quiet small" }, "Dense outputs (bars) and those of the sparse neuron: ", lines.map((line) => el("span", { cls: `key k${line.shade}` }, `${line.k} ${line.k === 1 ? "expert" : "experts"}`))));
    }
    return this.part("Experts", el("div", { cls: "wide" }, el("table", { cls: "plain" }, el("thead", {}, el("tr", {}, shown.map((name) => el("th", { cls: name === "run" || name === "router" ? "text" : "" }, titles[name])))), el("tbody", {}, experts.map((row) => el("tr", {}, shown.map((name) => cell(name, row[name]))))))),
      el("p", { cls: "quiet small" }, "RI: how many times smaller the error is than with one expert. WD in σ: of all tokens, and the mean inside the clusters."), charts);
  }

  ablation({ ablated }) {
    if (!ablated.length) return this.part("Under ablation", this.lacks("ablation"));
    const arms = ablated.flatMap((own) => DATA.arms.filter((arm) => arm.run === own.run && arm.selection === own.selection && arm.by === own.by && arm.seed === own.seed));
    const body = arms.map((arm) => el("tr", {}, el("td", { cls: "text" }, arm.selection + (arm.by ? ` by ${arm.by}` : "") + (arm.seed >= 0 ? `, seed ${arm.seed}` : "")), el("td", { cls: "text" }, arm.intervention), el("td", {}, number(arm.strength, 3)), el("td", {}, counted(arm.n_rows ?? 0)),
      el("td", { cls: "text" }, arm.measure + (arm.experts > 1 ? `, ${arm.experts} experts` : "")), el("td", {}, number(arm.value)), el("td", { cls: "quiet" }, arm.low === null ? "" : `${number(arm.low)} to ${number(arm.high)}`), el("td", {}, number(arm.dense))));
    return this.part("Under ablation", el("p", { cls: "quiet small" }, "What the model measures where this neuron and all others of the selection are changed together; none of these numbers is this neuron's alone."),
      el("div", { cls: "wide" }, el("table", { cls: "plain" }, el("thead", {}, el("tr", {}, ["selection", "intervention", "strength", "neurons", "measure", "value", "95 %", "dense"].map((name, i) => el("th", { cls: [0, 1, 4].includes(i) ? "text" : "" }, name)))), el("tbody", {}, body))));
  }
}
