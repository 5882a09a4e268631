// The live page: what the stream says goes to the parts that show it.

import { showInstances } from "./banks.js";
import { TONES, drawLine, drawTrends, spanOf } from "./charts.js";
import * as detail from "./detail.js";
import { ago, count, find, fit, make, mark, write } from "./dom.js";
import * as flow from "./flow.js";
import * as requests from "./requests.js";
import { Stream, hasKey, keep, onRefused } from "./stream.js";

const KEPT_POINTS = 600, KEPT_EVENTS = 200, SHOWN_EVENTS = 50, SAY_MS = 3000;
const state = { first: true, points: [], events: [], instances: [], sizes: "", now: 0 };

const latest = (iid) => state.instances.find((it) => it.iid === iid);
const open = (iid) => detail.instance(iid, latest);

// ---- what is said to those who do not see the page: rarely, and together

const sayings = [];
let saying = 0;

function say(text) {
  sayings.push(text);
  saying ||= setTimeout(() => {
    saying = 0;
    write(find("said"), sayings.splice(0).slice(-4).join(". "));
  }, SAY_MS);
}

function link(is, text) {
  const node = find("link");
  if (node.dataset.state === is && find("link-text").textContent === text) return;
  if (node.dataset.state !== is && !(node.dataset.state === "wait" && is === "live")) say(text);
  mark(node, "state", is);
  write(find("link-text"), text);
}

// ---- parts of a message

function showNotes(notes) {
  if (notes.length && find("notes").hidden) say(notes[0]);
  find("notes").hidden = notes.length === 0;
  fit(find("notes"), notes.length, () => make("li")).forEach((item, i) => write(item, notes[i]));
}

function showEvents() {
  const shown = state.events.slice(-SHOWN_EVENTS).reverse();
  fit(find("events"), shown.length, () => make("li", make("span.dim"), make("b"), make("span"))).forEach((item, i) => {
    const [at, kind, iid, note] = shown[i], [when, what, more] = item.children;
    mark(item, "tone", TONES[kind] ?? "dim");
    write(when, ago(Math.max(0, state.now - at)));
    write(what, `${iid || "all"} ${kind}`);
    write(more, note);
  });
}

function drawAll() {
  const span = spanOf(state.points, state.now), { points, events, now } = state;
  const faults = events.map(([at, kind]) => [at, TONES[kind]]).filter(([, tone]) => tone !== "good");
  drawTrends({ points, now, span, events: faults });
  drawLine(find("line"), events, now, span);
  write(find("span"), `last ${span / 60} minutes`);
}

function keepEvents(events, now) {
  for (const [kind, iid, age, note] of events) {
    state.events.push([now - age, kind, iid, note]);
    if (!state.first) say(`${iid} ${kind} ${note}`);
  }
  state.events.splice(0, state.events.length - KEPT_EVENTS);
}

function begin(data) { // the first message of a connection has all
  Object.assign(state, { points: data.history ?? [], events: [] });
  requests.forget();
  flow.forget();
  write(find("model"), data.model);
  write(find("version"), data.version);
  document.title = `${data.model} · tetri`;
}

function receive(data) {
  if (state.first) begin(data);
  else if (data.missed || data.epoch !== state.epoch) { // who is still open is not known
    requests.forgetOpen();
    flow.forget();
  }
  const { first } = state;
  Object.assign(state, { now: data.now, epoch: data.epoch, instances: data.instances });
  if (data.point && state.points.at(-1)?.at !== data.point.at) state.points.push(data.point);
  state.points.splice(0, state.points.length - KEPT_POINTS);
  keepEvents(data.events, data.now);
  requests.note(data);
  showNotes(data.notes);
  for (const stage of ["queued", "prefill", "moving", "waiting", "decode"]) write(find(`n-${stage}`), count(data.requests[stage] ?? 0));
  const sizes = showInstances(data.instances, open);
  if (sizes !== state.sizes) flow.resize();
  state.sizes = sizes;
  flow.showMoves(data.moves, first);
  link("live", data.monitor ? "live" : "live, no view of the monitor yet");
  state.first = false;
  if (first || data.point || data.events.length) showEvents();
  if (first || data.point) {
    drawAll();
    requests.show();
  }
}

// ---- start

const stream = new Stream({
  began: () => { state.first = true; },
  message: receive,
  lost: (why) => link("lost", `${why}: trying again`),
});

onRefused((given) => {
  link("lost", "an API key is needed");
  write(find("key-why"), given ? "That key was not accepted." : "It stays in this tab.");
  if (!find("key-dialog").open) find("key-dialog").showModal();
});

find("key-form").addEventListener("submit", () => {
  keep(find("key").value.trim());
  find("key").value = "";
  writeCommands();
  stream.start();
});

find("find").addEventListener("submit", (event) => {
  event.preventDefault();
  const rid = find("rid").value.trim();
  if (rid) detail.explain(rid);
});

function writeCommands() {
  const key = hasKey() ? ' -H "Authorization: Bearer $TETRI_API_KEY"' : "";
  const address = new URL("v1/completions", location.href).href;
  write(find("try"), `tetri-cli submit "The capital of France is"\n\ncurl ${address}${key} -d '{"prompt": "The capital of France is", "max_tokens": 60}'`);
}

requests.onExplain(detail.explain);
writeCommands();
const redraw = () => { flow.resize(); if (state.now) drawAll(); };
new ResizeObserver(redraw).observe(find("banks"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
stream.start();
