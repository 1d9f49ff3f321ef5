// Of every page: elements made of text (never of markup), the theme, the data.
const $ = (id) => document.getElementById(id);

function add(node, children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    node.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return node;
}

function put(node, attributes) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") for (const [type, act] of Object.entries(value)) node.addEventListener(type, act);
    else node.setAttribute(name === "cls" ? "class" : name, value === true ? "" : String(value));
  }
  return node;
}

const el = (tag, attributes, ...children) => add(put(document.createElement(tag), attributes), children);
const svg = (tag, attributes, ...children) =>
  add(put(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes), children);

const DATA = JSON.parse($("data").textContent);

const theme = {
  dark: () => {
    const asked = document.documentElement.dataset.theme;
    return asked ? asked === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  },
  turn: () => {
    document.documentElement.dataset.theme = theme.dark() ? "light" : "dark";
    try { localStorage.setItem("entangle-theme", document.documentElement.dataset.theme); } catch { /* private */ }
    document.dispatchEvent(new Event("theme"));
  },
};
try {
  const kept = localStorage.getItem("entangle-theme");
  if (kept === "dark" || kept === "light") document.documentElement.dataset.theme = kept;
} catch { /* nothing is kept */ }
$("theme").addEventListener("click", theme.turn);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => document.dispatchEvent(new Event("theme")));

if ($("help")) {
  $("help-open").addEventListener("click", () => $("help").showModal());
  $("help-close").addEventListener("click", () => $("help").close());
} else {
  $("help-open").hidden = true;
}

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// Numbers as people read them: a real minus, a dash where there is none.
function fixed(value, decimals) {
  return value === null || Number.isNaN(value) ? "–" : Number.isFinite(value)
    ? value.toFixed(decimals).replace("-", "−") : (value < 0 ? "−∞" : "∞");
}
function number(value, digits = 4) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return value < 0 ? "−∞" : "∞";
  if (value === 0) return "0";
  const size = Math.abs(value);
  const text = size >= 1e6 || size < 1e-4 ? value.toExponential(digits - 1)
    : String(Number(value.toPrecision(digits)));
  return text.replace("-", "−");
}
const counted = (value) => value.toLocaleString("en-US");
const signed = (value) => (value > 0 ? "+" : "") + fixed(value, Math.abs(value) < 10 ? 2 : 1);
