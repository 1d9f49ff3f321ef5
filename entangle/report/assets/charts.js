// Small histograms on canvas, large ones as SVG.
const gaussian = (z) => Math.exp(-z * z / 2) / Math.sqrt(2 * Math.PI);
const SCALE = Math.min(window.devicePixelRatio || 1, 2);
const SMALL = { width: 92, height: 24 };

function smallBars(canvas, levels, start, n, inks) {
  const { width, height } = SMALL;
  if (canvas.width !== width * SCALE) {
    canvas.width = width * SCALE;
    canvas.height = height * SCALE;
  }
  const pen = canvas.getContext("2d"), step = width / n, floor = height - 1;
  pen.setTransform(SCALE, 0, 0, SCALE, 0, 0);
  pen.clearRect(0, 0, width, height);
  pen.fillStyle = inks.bar;
  let sum = 0;
  for (let i = 0; i < n; i++) {
    const level = levels[start + i];
    sum += level;
    if (level) pen.fillRect(i * step, floor - level * (floor - 2) / 63, step - 0.4, level * (floor - 2) / 63);
  }
  if (!sum) return;
  pen.strokeStyle = inks.curve;
  pen.globalAlpha = 0.55;
  pen.beginPath();
  const span = DATA.bars.span, width_z = 2 * span / n;
  for (let x = 0; x <= width; x += 2) {
    const level = gaussian((x / width - 0.5) * 2 * span) * width_z * sum;
    const y = floor - Math.min(level, 66) * (floor - 2) / 63;
    if (x) pen.lineTo(x, y); else pen.moveTo(x, y);
  }
  pen.stroke();
  pen.globalAlpha = 1;
}

function ticksOf(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough) || power;
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}

const tickText = (value) => number(Number(value.toPrecision(6)), 4);

// A frame with axes: returns the SVG, its scales and the group to draw in.
function frame(host, { low, high, top, height, label, side, title }) {
  const width = Math.max(280, Math.min(host.clientWidth || 640, 860));
  const left = 46, right = 12, upper = 16, lower = 34;
  const inner = { width: width - left - right, height: height - upper - lower };
  const x = (value) => left + (value - low) / (high - low) * inner.width;
  const y = (value) => upper + (1 - value / top) * inner.height;
  const root = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title });
  const axis = svg("g", { cls: "axis" });
  for (const value of ticksOf(low, high, width < 420 ? 5 : 9)) {
    axis.append(svg("line", { x1: x(value), x2: x(value), y1: y(0), y2: y(0) + 4 }),
      svg("text", { x: x(value), y: y(0) + 16, "text-anchor": "middle" }, tickText(value)));
  }
  axis.append(svg("line", { x1: left, x2: width - right, y1: y(0), y2: y(0) }),
    svg("text", { x: left + inner.width / 2, y: height - 3, "text-anchor": "middle" }, label),
    svg("text", { x: 12, y: upper + inner.height / 2, "text-anchor": "middle",
      transform: `rotate(-90 12 ${upper + inner.height / 2})` }, side));
  const marks = svg("g", {});
  root.append(marks, axis);
  host.replaceChildren(root);
  return { root, marks, x, y, left, right: width - right, upper, inner, width };
}

// The outputs of a neuron: bars with left, right, count; the Gaussian; modes and other lines above.
function distribution(host, bars, { modes = [], lines = [], logarithmic = false, height = 250, label } = {}) {
  const total = bars.reduce((sum, bar) => sum + bar.count, 0);
  if (!total) { host.replaceChildren(el("p", { cls: "note missing" }, "Nothing was counted of this neuron.")); return; }
  const low = Math.min(-4, bars[0].left), high = Math.max(4, bars[bars.length - 1].right);
  const density = densities(bars);
  const drawn = lines.flatMap((line) => densities(line.bars));
  const peak = Math.max(gaussian(0), ...density, ...drawn);
  const least = Math.min(...density.filter((d) => d > 0)) / 2;
  const raise = logarithmic ? (d) => Math.max(0, Math.log10(Math.max(d, 1e-300) / least)) : (d) => d;
  const chart = frame(host, { low, high, top: raise(peak) * 1.08 || 1, height, label: label || "output, in σ from the mean",
    side: logarithmic ? "density (log)" : "density", title: "distribution of outputs" });
  const { marks, x, y } = chart, floor = y(0);
  modes.forEach((mode, i) => {
    const from = x(Math.max(low, mode.left)), to = x(Math.min(high, mode.right));
    if (modes.length > 1) marks.append(svg("rect", { cls: `mode-band m${i % 6}`, x: from, y: chart.upper, width: Math.max(0, to - from), height: floor - chart.upper }));
  });
  bars.forEach((bar, i) => {
    if (bar.count) marks.append(svg("rect", { cls: "bar-fill", x: x(bar.left), width: Math.max(0.7, x(bar.right) - x(bar.left)), y: y(raise(density[i])), height: Math.max(0, floor - y(raise(density[i]))) },
      svg("title", {}, `${number(bar.left, 3)} to ${number(bar.right, 3)} σ: ${counted(bar.count)} of ${counted(total)} tokens`)));
  });
  let path = "";
  for (let i = 0; i <= 160; i++) {
    const z = low + (high - low) * i / 160;
    path += `${i ? "L" : "M"}${x(z).toFixed(1)},${Math.min(floor, y(raise(gaussian(z)))).toFixed(1)}`;
  }
  marks.append(svg("path", { cls: "curve", d: path }));
  for (const line of lines) stepLine(chart, line, raise);
  modes.forEach((mode, i) => marks.append(
    svg("line", { cls: `mode-line m${i % 6}`, x1: x(mode.center), x2: x(mode.center), y1: chart.upper, y2: floor }),
    svg("text", { cls: "mode-name", x: x(mode.center) + 4, y: chart.upper + 10 }, `mode ${mode.mode}`)));
}

function densities(bars) {
  const total = bars.reduce((sum, bar) => sum + bar.count, 0) || 1;
  return bars.map((bar) => bar.count / total / Math.max(bar.right - bar.left, 1e-9));
}

function stepLine(chart, line, raise) {
  let path = "";
  densities(line.bars).forEach((density, i) => {
    const bar = line.bars[i], level = chart.y(raise(density)).toFixed(1);
    path += `${i ? "L" : "M"}${chart.x(bar.left).toFixed(1)},${level}L${chart.x(bar.right).toFixed(1)},${level}`;
  });
  chart.marks.append(svg("path", { cls: `outline k${line.shade}`, d: path }));
}

// Where a value lies among many: a histogram with a mark, and a line for the floor.
function standing(host, values, mark, floor, title, label) {
  let high = 0, known = 0;
  for (const value of values) if (value === value) { known++; if (value > high) high = value; }
  if (!known || !(high > 0)) { host.replaceChildren(el("p", { cls: "note missing" }, "No neuron of this layer has a score.")); return; }
  const n = 48, counts = new Uint32Array(n), top = high * 1.03;
  for (const value of values) if (value === value) counts[Math.min(n - 1, Math.floor(value / top * n))]++;
  const chart = frame(host, { low: 0, high: top, top: Math.max(...counts) * 1.12, height: 200, label, side: "neurons", title });
  const { marks, x, y } = chart;
  counts.forEach((count, i) => count && marks.append(svg("rect", { cls: "typical", x: x(i * top / n), width: x(top / n) - x(0) - 0.6, y: y(count), height: y(0) - y(count) })));
  if (floor !== null) marks.append(svg("line", { cls: "floor", x1: x(floor), x2: x(floor), y1: chart.upper, y2: y(0) }), svg("text", { cls: "floor-name", x: x(floor) + 4, y: chart.upper + 10 }, "null floor"));
  if (mark === mark && mark !== null) {
    const late = x(mark) > chart.width * 0.7;
    marks.append(svg("line", { cls: "mark", x1: x(mark), x2: x(mark), y1: chart.upper, y2: y(0) }),
      svg("text", { cls: "mark-name", x: x(mark) + (late ? -4 : 4), y: chart.upper - 4, "text-anchor": late ? "end" : "start" }, "this neuron"));
  }
}
