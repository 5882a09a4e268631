// Requests between the banks: dots behind the cards, and a faint line for each hand-over of late.

import { cardOf } from "./banks.js";
import { sized } from "./charts.js";
import { ENDS, colour, find } from "./dom.js";

const MOST = 300; // dots at once; the numbers beside them count all
const HOP_MS = 650, FRAME_MS = 30, LINE_MS = 4000, MOST_LINES = 30;
const still = matchMedia("(prefers-reduced-motion: reduce)");

const canvas = find("flow"), pen = canvas.getContext("2d");
const places = new Map(); // id of an open choice -> iid of who had it last
const dots = []; // {path, start, tone}
const lines = new Map(); // [from, to] -> when the last hand-over began
let colours = {}, drawn = 0, frame = 0;

export function forget() {
  places.clear();
  dots.length = 0;
  lines.clear();
}

export function resize() {
  sized(canvas);
  for (const name of ["prefill", "decode", "mixed", "bad", "ink", "dim"]) colours[name] = colour(name);
  wake();
}

// Moves of one message, oldest first: a choice goes through all its places since the last.
export function showMoves(moves, first) {
  const now = performance.now(), routes = new Map();
  for (const [rid, stage, iid, age, attempt] of moves) {
    const ended = ENDS.includes(stage), route = routes.get(rid) ?? { stops: [places.get(rid) ?? ""], age };
    if (iid && iid !== route.stops.at(-1)) route.stops.push(iid);
    if (ended) route.stops.push("");
    Object.assign(route, { stage, attempt });
    routes.set(rid, route);
    if (ended) places.delete(rid);
    else if (iid) places.set(rid, iid);
  }
  if (first) return; // what happened before the page was open
  const oldest = Math.max(...[...routes.values()].map((route) => route.age), 0);
  for (const route of routes.values()) follow(route, now, Math.min(oldest - route.age, 1) * 1000);
  if (dots.length + lines.size) wake();
}

function follow({ stops, attempt, stage }, now, delay) {
  stops.forEach((to, i) => {
    const from = stops[i - 1];
    if (i === 0 || from === to) return;
    if (from && to) {
      const key = JSON.stringify([from, to]);
      lines.delete(key);
      lines.set(key, now); // the newest are last
    }
    if (still.matches || document.hidden || dots.length >= MOST) return;
    const bad = stage === "failed" || (attempt > 1 && to);
    dots.push({ from, to, start: now + delay + (i - 1) * HOP_MS, tone: bad ? "bad" : cardOf(to)?.dataset.role ?? "dim" });
  });
}

function middle(iid, box) {
  const at = cardOf(iid)?.getBoundingClientRect();
  return at && { x: at.left - box.left + at.width / 2, y: at.top - box.top + at.height / 2 };
}

function curve(from, to, box, seen) { // geometry is read once a frame for each pair; "" is outside
  const key = JSON.stringify([from, to]);
  if (!seen.has(key)) {
    const a = middle(from, box), b = middle(to, box), stacked = box.width < 700;
    const start = from ? a : b && (stacked ? { x: box.width / 2, y: 0 } : { x: 0, y: b.y });
    const end = to ? b : a && (stacked ? { x: box.width / 2, y: box.height } : { x: box.width, y: a.y });
    seen.set(key, start && end && { start, end });
  }
  return seen.get(key);
}

function point({ start, end }, t) { // a cubic curve with level ends, or upright ones where banks are stacked
  const s = 1 - t, wide = Math.abs(end.x - start.x) > Math.abs(end.y - start.y);
  const half = { x: (start.x + end.x) / 2, y: (start.y + end.y) / 2 };
  const a = wide ? { x: half.x, y: start.y } : { x: start.x, y: half.y };
  const b = wide ? { x: half.x, y: end.y } : { x: end.x, y: half.y };
  const mix = (axis) => s ** 3 * start[axis] + 3 * s * s * t * a[axis] + 3 * s * t * t * b[axis] + t ** 3 * end[axis];
  return [mix("x"), mix("y")];
}

function drawLines(now, box, seen) {
  for (const key of [...lines.keys()].slice(0, -MOST_LINES)) lines.delete(key);
  for (const [key, at] of lines) {
    const left = 1 - (now - at) / LINE_MS, path = left > 0 && curve(...JSON.parse(key), box, seen);
    if (!path) { lines.delete(key); continue; }
    pen.globalAlpha = 0.06 + 0.3 * left;
    pen.strokeStyle = colours.ink;
    pen.lineWidth = 1;
    pen.beginPath();
    for (let i = 0; i <= 16; i++) pen.lineTo(...point(path, i / 16));
    pen.stroke();
  }
}

function drawDots(now, box, seen) {
  for (let i = dots.length - 1; i >= 0; i--) {
    const dot = dots[i], t = (now - dot.start) / HOP_MS;
    const path = t < 1 && curve(dot.from, dot.to, box, seen);
    if (!path) { dots.splice(i, 1); continue; }
    if (t < 0) continue;
    const smooth = t * t * (3 - 2 * t);
    pen.fillStyle = colours[dot.tone] ?? colours.mixed;
    for (let tail = 4; tail >= 0; tail--) {
      pen.globalAlpha = tail ? 0.28 - 0.06 * tail : 1;
      pen.beginPath();
      pen.arc(...point(path, Math.max(0, smooth - tail * 0.025)), tail ? 3 : 3.5, 0, 7);
      pen.fill();
    }
  }
}

function draw(now) {
  frame = 0;
  if (document.hidden) return;
  if (now - drawn < FRAME_MS && dots.length) return wake();
  drawn = now;
  const box = canvas.getBoundingClientRect(), seen = new Map();
  pen.clearRect(0, 0, box.width, box.height);
  drawLines(now, box, seen);
  drawDots(now, box, seen);
  pen.globalAlpha = 1;
  if (dots.length) wake(); // without dots, the next message draws
}

function wake() {
  frame ||= requestAnimationFrame(draw);
}
