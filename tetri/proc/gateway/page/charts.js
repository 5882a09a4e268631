// Small charts over the last minutes, and the time line, all on one axis of time.

import { ago, colour, find, make, none, seconds, short, write } from "./dom.js";

const SPANS = [120, 300, 600]; // seconds
const LEFT = 44, BOTTOM = 18, TOP = 8;

export const TRENDS = [
  { name: "ttft", title: "TTFT", about: "time to the first token", lines: ["p50", "p99"], show: seconds },
  { name: "tpot", title: "TPOT", about: "time per output token after the first", lines: ["p50", "p99"], show: seconds },
  { name: "tokens_s", title: "Throughput", about: "output tokens per second", lines: ["tokens/s"], show: short },
  { name: "queue", title: "Queue", about: "time in the queue, mean", lines: ["predicted", "real"], show: seconds },
];

export function spanOf(points, now) {
  const age = points.length ? now - points[0].at : 0;
  return SPANS.find((span) => age <= span) ?? SPANS.at(-1);
}

export function sized(canvas) { // a pen whose unit is one pixel of the page
  const { clientWidth: width, clientHeight: height } = canvas, scale = Math.min(devicePixelRatio, 2);
  const w = Math.round(width * scale), h = Math.round(height * scale);
  if (canvas.width !== w || canvas.height !== h) Object.assign(canvas, { width: w, height: h });
  const pen = canvas.getContext("2d");
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.clearRect(0, 0, width, height);
  pen.font = `11px ${getComputedStyle(canvas).fontFamily}`;
  return { pen, width, height };
}

export function ceiling(top) { // the next of 1, 2, 5, 10, 20, ...
  if (!(top > 0)) return 1;
  const unit = 10 ** Math.floor(Math.log10(top) + 1e-9);
  return [1, 2, 5, 10].find((n) => n * unit >= top * 0.9999) * unit;
}

function axes({ pen, width, height }, top, show, span) {
  const bottom = height - BOTTOM;
  pen.strokeStyle = colour("grid");
  pen.fillStyle = colour("dim");
  pen.lineWidth = 1;
  pen.textBaseline = "middle";
  for (const part of [0, 0.5, 1]) {
    const y = Math.round(bottom - part * (bottom - TOP)) + 0.5;
    pen.beginPath();
    pen.moveTo(LEFT, y);
    pen.lineTo(width, y);
    pen.stroke();
    pen.textAlign = "right";
    if (part !== 0.5) pen.fillText(part ? show(top).replace(/\.0+(?=\D|$)/, "") : "0", LEFT - 6, y);
  }
  pen.textBaseline = "alphabetic";
  pen.textAlign = "left";
  pen.fillText(`−${span / 60} min`, LEFT, height - 3);
  pen.textAlign = "right";
  pen.fillText("now", width, height - 3);
}

// Draws lines of [at, value or null]; gaps stay gaps. `tones`: names of colours.
export function drawChart(canvas, { lines, tones, show, now, span, top, events = [] }) {
  const area = sized(canvas), { pen, width, height } = area;
  const highest = top ?? ceiling(Math.max(0, ...lines.flat().map(([, value]) => value ?? 0)));
  axes(area, highest, show, span);
  const x = (at) => LEFT + (1 - (now - at) / span) * (width - LEFT);
  const y = (value) => height - BOTTOM - Math.min(value / highest, 1) * (height - BOTTOM - TOP);
  for (const [at, tone] of events) {
    if (now - at > span) continue;
    pen.fillStyle = colour(tone);
    pen.globalAlpha = 0.55;
    pen.fillRect(Math.round(x(at)), TOP, 1, height - BOTTOM - TOP);
  }
  pen.globalAlpha = 1;
  lines.forEach((line, i) => {
    pen.strokeStyle = pen.fillStyle = colour(tones[i]);
    pen.lineWidth = i ? 1.2 : 1.8;
    pen.setLineDash(i ? [4, 2] : []);
    let last = null;
    pen.beginPath();
    for (const [at, value] of line) {
      if (value == null || now - at > span) continue;
      if (last !== null && at - last < 4) pen.lineTo(x(at), y(value));
      else { pen.moveTo(x(at), y(value)); pen.lineTo(x(at) + 1, y(value)); }
      last = at;
    }
    pen.stroke();
  });
  pen.setLineDash([]);
}

class Trend {
  constructor(trend) {
    Object.assign(this, trend, { hover: null });
    this.values = trend.lines.map(() => make("b", {}, none));
    const legend = trend.lines.map((name, i) => make("span", { className: `line-${i}` }, `${name} `, this.values[i]));
    this.canvas = make("canvas", { role: "img", "aria-label": `${trend.title}: ${trend.about}` });
    this.when = make("span", { className: "dim when" });
    this.node = make("figure", { className: "panel" },
      make("figcaption", {}, make("h3", { title: trend.about }, trend.title), this.when, make("span", { className: "values" }, ...legend)), this.canvas);
    this.canvas.addEventListener("pointermove", (event) => { this.hover = event.offsetX; this.draw(); });
    this.canvas.addEventListener("pointerleave", () => { this.hover = null; this.draw(); });
  }

  line(i, points) {
    const value = (point) => (this.lines.length === 1 ? point[this.name] : point[this.name]?.[i] ?? null);
    return points.map((point) => [point.at, value(point)]);
  }

  draw(state = this.state) {
    if (!state || !this.canvas.clientWidth) return;
    this.state = state;
    const { points, now, span, events } = state, lines = this.lines.map((_, i) => this.line(i, points));
    const tones = ["line-0", "line-1"];
    drawChart(this.canvas, { lines, tones, show: this.show, now, span, events });
    const width = this.canvas.clientWidth - LEFT;
    const at = this.hover === null ? now : now - span * (1 - Math.max(0, this.hover - LEFT) / width);
    write(this.when, this.hover === null ? "" : ago(now - at));
    const within = (line) => line.filter(([t, v]) => v != null && t <= at + 0.5 && t > at - 10).at(-1)?.[1];
    const found = lines.map(within);
    this.values.forEach((node, i) => write(node, this.show(found[i])));
    this.canvas.setAttribute("aria-label", `${this.title}, ${this.about}: ${this.lines.map((name, i) => `${name} ${this.show(found[i])}`).join(", ")}`);
  }
}

const trends = TRENDS.map((trend) => new Trend(trend));
find("charts").append(...trends.map((trend) => trend.node));

export const drawTrends = (state) => trends.forEach((trend) => trend.draw(state));

export const TONES = { joined: "good", back: "good", healed: "good", lost: "bad", failing: "bad", killed: "bad", role: "accent" };

export function drawLine(canvas, events, now, span) { // [at, kind, iid]
  const { pen, width, height } = sized(canvas), y = 16;
  const x = (at) => 8 + (1 - (now - at) / span) * (width - 16);
  pen.fillStyle = colour("grid");
  pen.fillRect(8, y, width - 16, 2);
  pen.textAlign = "center";
  for (let back = 0; back <= span; back += span / (width < 500 ? 2 : 5)) {
    pen.fillStyle = colour("dim");
    pen.fillRect(Math.round(x(now - back)), y - 3, 1, 8);
    pen.textAlign = back === 0 ? "right" : back === span ? "left" : "center";
    pen.fillText(back ? `−${back >= 60 ? `${+(back / 60).toFixed(1)} min` : `${back} s`}` : "now", x(now - back) + (back === 0 ? 6 : back === span ? -6 : 0), height - 3);
  }
  for (const [at, kind] of events) {
    if (now - at > span) continue;
    pen.fillStyle = pen.strokeStyle = colour(TONES[kind] ?? "dim");
    pen.lineWidth = 2;
    pen.beginPath();
    const cx = x(at), cy = y + 1;
    if (TONES[kind] === "bad") { pen.moveTo(cx - 5, cy - 5); pen.lineTo(cx + 5, cy + 5); pen.moveTo(cx + 5, cy - 5); pen.lineTo(cx - 5, cy + 5); pen.stroke(); }
    else if (kind === "role") { pen.moveTo(cx, cy - 7); pen.lineTo(cx + 7, cy); pen.lineTo(cx, cy + 7); pen.lineTo(cx - 7, cy); pen.fill(); }
    else { pen.arc(cx, cy, 5, 0, 7); pen.fill(); }
  }
}
