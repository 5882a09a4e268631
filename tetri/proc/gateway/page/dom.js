// Elements, and numbers as text. Whatever comes from the server becomes text, never HTML.

export const find = (id) => document.getElementById(id);

// make("p.dim", {title: "x"}, "text"): an element with its classes; options and children may be left out.
export function make(kind, ...rest) {
  const [tag, ...classes] = kind.split("."), node = document.createElement(tag);
  if (classes.length) node.className = classes.join(" ");
  const options = rest[0]?.constructor === Object ? rest.shift() : {};
  for (const [name, value] of Object.entries(options)) {
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...rest);
  return node;
}

export function fit(parent, number, create) { // so many children; those that stay are the same
  while (parent.children.length > number) parent.lastChild.remove();
  while (parent.children.length < number) parent.append(create());
  return [...parent.children];
}

export function write(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function mark(node, name, value) {
  if (node.dataset[name] !== String(value)) node.dataset[name] = value;
}

export function style(node, name, value) {
  if (node.style.getPropertyValue(name) !== String(value)) node.style.setProperty(name, value);
}

export const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

const grouped = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
export const none = "–";
export const count = (x) => (x == null ? none : grouped.format(x));
export const percent = (x) => (x == null ? none : `${Math.round(100 * x)}%`);

export function short(x) { // three digits: 0.82, 8.20, 82.0, 820, 8.2k
  if (x == null) return none;
  if (x >= 1e6) return `${(x / 1e6).toFixed(1)}M`;
  if (x >= 1e4) return `${(x / 1e3).toFixed(x >= 1e5 ? 0 : 1)}k`;
  return x >= 100 || x === 0 ? x.toFixed(0) : x.toFixed(x >= 10 ? 1 : 2);
}

export function seconds(x) {
  if (x == null) return none;
  if (x === 0) return "0 s";
  if (x < 0.9995) return `${short(x * 1000)} ms`;
  if (x < 120) return `${short(x)} s`;
  return x < 7200 ? `${(x / 60).toFixed(x < 600 ? 1 : 0)} min` : `${(x / 3600).toFixed(1)} h`;
}

export function ago(x) {
  if (x < 60) return `${Math.floor(x)} s ago`;
  return x < 7200 ? `${Math.floor(x / 60)} min ago` : `${Math.floor(x / 3600)} h ago`;
}

export function bytes(x) {
  if (x == null) return none;
  const power = x < 1000 ? 0 : Math.min(4, Math.floor(Math.log10(x) / 3));
  return `${short(x / 1000 ** power)} ${["B", "kB", "MB", "GB", "TB"][power]}`;
}

export const ratio = (x) => (x == null ? none : x.toFixed(2));

export const ENDS = ["done", "failed", "cancelled"]; // stages
