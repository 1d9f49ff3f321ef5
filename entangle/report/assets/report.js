// What is shown: the table, a neuron, layers, runs; the address says which.
const VIEWS = ["neurons", "neuron", "layers", "runs"];

function fail(error) {
  const text = typeof DecompressionStream === "undefined"
    ? "This page needs a browser of 2023 or later (DecompressionStream)." : `The page cannot be read: ${error}`;
  $("count").textContent = "";
  $("wrong").textContent = text;
  $("wrong").hidden = false;
}

function view(name) {
  for (const one of VIEWS) $(`view-${one}`).hidden = one !== name;
  for (const link of document.querySelectorAll(".top nav a")) {
    if (link.dataset.view === name || (name === "neuron" && link.dataset.view === "neurons")) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

// Texts of every page to search in: tokens of modes, contexts, tokens by mean output.
function searcher(page, count) {
  let ready = null;
  const column = async (name, key, texts) => {
    const table = page.tables[name];
    if (!table) return;
    const { starts, names, columns } = await table.load(), found = columns[names.indexOf(key)];
    for (let p = 0; p < count; p++) for (let i = starts[p]; i < starts[p + 1]; i++) texts[p].push(found.texts[found.codes[i]]);
  };
  return () => ready ??= (async () => {
    const texts = Array.from({ length: count }, () => []);
    await column("tokens", "token", texts);
    for (const key of ["before", "token", "after"]) await column("contexts", key, texts);
    const modes = Array.from({ length: count }, () => []);
    await column("modes", "top_tokens", modes);
    modes.forEach((list, p) => list.forEach((json) => texts[p].push(...JSON.parse(json).map(([token]) => token))));
    if (page.tables.windows) {
      const { starts, names, columns } = await page.tables.windows.load(), [places, before, after] = ["place", "before", "after"].map((name) => columns[names.indexOf(name)]);
      page.text ??= { ids: await unpack(DATA.text.ids), words: await unpack(DATA.text.words) };
      for (let p = 0; p < count; p++) for (let i = starts[p]; i < starts[p + 1]; i++) {
        let text = "";
        for (let at = places[i] - before[i]; at <= places[i] + after[i]; at++) text += page.word(at);
        texts[p].push(text);
      }
    }
    return texts.map((list) => list.join("\n").toLowerCase());
  })();
}

async function start() {
  $("count").textContent = "reading …";
  const neurons = await Neurons.load();
  const grid = new Grid($("grid"), neurons, (row) => { location.hash = neurons.address(row); });
  const page = new NeuronPage($("view-neuron"), neurons, grid), words = searcher(page, neurons.pageOf.size);
  DATA.layers.forEach((layer, l) => $("layer").append(el("option", { value: l }, layer.label === layer.name ? layer.name : `${layer.label}  (${layer.name})`)));
  for (const column of neurons.columns) for (const [sign, text] of [["-", "largest"], ["+", "smallest"]]) $("sort").append(el("option", { value: sign + column.name }, `${text} ${column.title}`));
  $("sort").append(el("option", { value: "+row" }, "in the model's order"));
  $("names").textContent = neurons.columns.map((column) => column.name).join(", ");
  grid.changed = () => {
    $("count").textContent = grid.rows.length === neurons.n ? `${counted(neurons.n)} neurons` : `${counted(grid.rows.length)} of ${counted(neurons.n)} neurons`;
    $("sort").value = (grid.descending ? "-" : "+") + grid.sort;
  };
  $("sort").addEventListener("change", (event) => grid.sortBy(event.target.value.slice(1), event.target.value[0] === "-"));
  $("layer").addEventListener("change", (event) => {
    const own = event.target.value === "" ? null : DATA.layers[event.target.value];
    location.hash = own ? `#${encodeURIComponent(own.name)}/` : "#";
  });

  let asked = 0, timer = 0;
  const search = async () => {
    const turn = ++asked;
    try {
      const tests = await testsOf($("search").value, neurons, words);
      if (turn !== asked) return;
      grid.tests = tests;
      $("wrong").hidden = true;
    } catch (error) {
      grid.tests = [() => false];
      $("wrong").textContent = error.message;
      $("wrong").hidden = false;
    }
    grid.refresh();
  };
  $("search").addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(search, 120); });
  $("search").addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === "ArrowDown") { event.preventDefault(); $("grid").focus(); }
  });

  const only = (l) => { grid.layer = l; $("layer").value = l < 0 ? "" : String(l); grid.refresh(); };
  let kept = 0;
  const route = async () => {
    const hash = location.hash.replace(/^#/u, ""), cut = hash.lastIndexOf("/");
    if (!$("view-neurons").hidden) kept = grid.host.scrollTop;
    if (hash === "main" && document.documentElement.dataset.ready) return $("main").focus();
    if (hash === ":layers" || hash === ":runs") return view(hash.slice(1));
    let name = "", row = -1;
    try { name = decodeURIComponent(cut < 0 ? hash : hash.slice(0, cut)); } catch { name = hash; }
    const index = cut < 0 ? "" : hash.slice(cut + 1), l = neurons.byName.get(name);
    if (/^\d+$/u.test(index)) row = neurons.row(name, Number(index));
    if (row >= 0) {
      await page.show(row);
      view("neuron");
      scrollTo(0, 0);
      page.redraws.forEach((redraw) => redraw());
      return;
    }
    view("neurons");
    const found = l !== undefined && index === "";
    if (found && grid.layer !== l) only(l);
    else if (!found && hash === "" && grid.layer >= 0) only(-1);
    else { grid.draw(); grid.host.scrollTop = kept; }
    const lost = hash !== "" && hash !== "main" && !found;
    $("wrong").hidden = !lost;
    if (lost) $("wrong").textContent = `There is no neuron “${name}/${index}” on this page.`;
  };
  addEventListener("hashchange", route);
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
    const typing = event.target.closest("input:not([type=checkbox]), select, textarea"), single = !$("view-neuron").hidden;
    if (event.key === "Escape") {
      if (single) location.hash = grid.layer < 0 ? "#" : `#${encodeURIComponent(DATA.layers[grid.layer].name)}/`;
      else if ($("view-neurons").hidden) location.hash = "#";
      else if ($("search").value) { $("search").value = ""; search(); } else if (typing) $("grid").focus();
      return;
    }
    if (typing) return;
    const step = { ArrowLeft: "-1", ArrowRight: "1" }[event.key];
    if (event.key === "/") { if (single) location.hash = "#"; view("neurons"); $("search").focus(); $("search").select(); }
    else if (event.key === "t") theme.turn();
    else if (event.key === "?") $("help").showModal();
    else if (single && step) document.querySelector(`[data-step="${step}"]`)?.click();
    else if (!$("view-neurons").hidden && !event.target.closest("button, a") && grid.key(event)) { /* it moved */ }
    else return;
    event.preventDefault();
  });
  grid.sortBy("wd", true);
  await route();
  document.documentElement.dataset.ready = "true";
}

start().catch(fail);
