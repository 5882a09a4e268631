// Charts over the last minutes, and the time line, all on one axis of time.

import { ago, colour, find, make, none, percent, seconds, short, write } from "./dom.js";

const SPANS = [120, 300, 600]; // seconds
const LEFT = 50, BOTTOM = 18, TOP = 8;

const TRENDS = [
  { title: "TTFT", about: "time to the first token", lines: ["p50", "p99"], values: (p) => p.ttft ?? [], show: seconds },
  { title: "TPOT", about: "time per output token after the first", lines: ["p50", "p99"], values: (p) => p.tpot ?? [], show: seconds },
  { title: "Throughput", about: "output tokens per second", lines: ["tokens/s"], values: (p) => [p.tokens_s], show: short },
  { title: "Attainment", about: "share of requests that keep their limits of latency", lines: ["kept"], values: (p) => [p.attainment], show: percent, top: 1 },
  { title: "Goodput", about: "requests per second that keep them", lines: ["kept", "all"], values: (p) => [p.goodput, p.requests_s], show: short },
  { title: "Queue", about: "mean time in the queue", lines: ["predicted", "real"], values: (p) => p.queue ?? [], show: seconds },
];

export function spanOf(points, now) {
  const age = points.length ? now - points[0].at : 0;
  return SPANS.find((span) => age <= span) ?? SPANS.at(-1);
}

export function sized(canvas) { // emptied, with a pen whose unit is one pixel of the page
  const { clientWidth: width, clientHeight: height } = canvas, scale = Math.min(devicePixelRatio, 2), pen = canvas.getContext("2d");
  Object.assign(canvas, { width: width * scale, height: height * scale });
  pen.scale(scale, scale);
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
  pen.strokeStyle = colour("edge");
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

// A figure with lines over time. `values`: a point -> the value of each line, or none.
export class Chart {
  constructor({ title, about = "", lines, values, show, top }) {
    Object.assign(this, { title, about, lines, values, show, top, hover: null });
    this.texts = lines.map(() => make("b", none));
    this.canvas = make("canvas", { role: "img" });
    this.when = make("span.dim.when");
    const legend = lines.map((name, i) => make(`span.line-${i}`, `${name} `, this.texts[i]));
    this.node = make("figure.panel",
      make("figcaption", make("h3", { title: about }, title), this.when, make("span.values", ...legend)), this.canvas);
    this.canvas.addEventListener("pointermove", (event) => { this.hover = event.offsetX; this.draw(); });
    this.canvas.addEventListener("pointerleave", () => { this.hover = null; this.draw(); });
  }

  draw(state = this.state) { // {points, now, span, events: [at, tone]}
    this.state = state;
    if (!state || !this.canvas.clientWidth) return;
    const { points, now, span } = state, rows = points.filter(({ at }) => now - at <= span).map((point) => [point.at, this.values(point)]);
    this.drawLines(rows, state);
    const at = this.hover === null ? now : now - span * (1 - Math.max(0, this.hover - LEFT) / (this.canvas.clientWidth - LEFT));
    write(this.when, this.hover === null ? "" : ago(now - at));
    const texts = this.lines.map((_, i) => this.show(rows.findLast(([t, row]) => row[i] != null && t <= at + 0.5 && t > at - 10)?.[1][i]));
    texts.forEach((text, i) => write(this.texts[i], text));
    this.canvas.setAttribute("aria-label", `${this.title} ${this.about}: ${texts.map((text, i) => `${this.lines[i]} ${text}`).join(", ")}`);
  }

  drawLines(rows, { now, span, events = [] }) {
    const area = sized(this.canvas), { pen, width, height } = area;
    const highest = this.top ?? ceiling(Math.max(0, ...rows.flatMap(([, row]) => row.map((value) => value ?? 0))));
    const x = (at) => LEFT + (1 - (now - at) / span) * (width - LEFT);
    const y = (value) => height - BOTTOM - Math.min(value / highest, 1) * (height - BOTTOM - TOP);
    axes(area, highest, this.show, span);
    pen.globalAlpha = 0.55;
    for (const [at, tone] of events) {
      pen.fillStyle = colour(tone);
      if (now - at <= span) pen.fillRect(Math.round(x(at)), TOP, 1, height - BOTTOM - TOP);
    }
    pen.globalAlpha = 1;
    this.lines.forEach((_, i) => {
      let last = -1e9;
      pen.strokeStyle = colour(`line-${i}`);
      pen.lineWidth = i ? 1.2 : 1.8;
      pen.setLineDash(i ? [4, 2] : []);
      pen.beginPath();
      for (const [at, row] of rows) {
        if (row[i] == null) continue;
        if (at - last >= 4) pen.moveTo(x(at) - 1, y(row[i])); // gaps stay gaps
        pen.lineTo(x(at), y(row[i]));
        last = at;
      }
      pen.stroke();
    });
    pen.setLineDash([]);
  }
}

const trends = TRENDS.map((trend) => new Chart(trend));
find("charts").append(...trends.map((trend) => trend.node));

export const drawTrends = (state) => trends.forEach((trend) => trend.draw(state));

export const TONES = { joined: "good", back: "good", healed: "good", lost: "bad", failing: "bad", killed: "bad", role: "accent" };

export function drawLine(canvas, events, now, span) { // [at, kind, iid]
  const { pen, width, height } = sized(canvas), y = 16;
  const x = (at) => 8 + (1 - (now - at) / span) * (width - 16);
  pen.fillStyle = colour("edge");
  pen.fillRect(8, y, width - 16, 2);
  pen.textAlign = "center";
  for (let back = 0, parts = width < 500 ? 2 : span === 120 ? 4 : 5; back <= span; back += span / parts) {
    pen.fillStyle = colour("dim");
    pen.fillRect(Math.round(x(now - back)), y - 3, 1, 8);
    pen.textAlign = back === 0 ? "right" : back === span ? "left" : "center";
    pen.fillText(back ? `−${span > 120 ? `${back / 60} min` : `${back} s`}` : "now", x(now - back), height - 3);
  }
  pen.textAlign = "center";
  pen.font = pen.font.replace("11px", "17px");
  for (const [at, kind] of events) {
    if (now - at > span) continue;
    const tone = TONES[kind] ?? "dim";
    pen.fillStyle = colour(tone);
    pen.fillText({ bad: "✖", accent: "◆" }[tone] ?? "●", x(at), y + 6);
  }
}
