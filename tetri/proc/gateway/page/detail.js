// The dialogs: the waterfall of a request, and the load of an instance over time.

import { Chart, ceiling, spanOf } from "./charts.js";
import { bytes, count, find, make, none, percent, ratio, seconds, short, style, write } from "./dom.js";
import { ask } from "./stream.js";

const AGAIN_MS = 2000, MOST_ROWS = 400;
const dialog = find("detail"), body = find("detail-body");
let again = 0, shown = null;

dialog.addEventListener("close", () => { clearTimeout(again); shown = null; });
find("close").addEventListener("click", () => dialog.close());
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });

// Opens the dialog; `load` fills the body and returns whether to do so again after a while.
async function present(title, load) {
  const mine = (shown = {});
  clearTimeout(again);
  write(find("h-detail"), title);
  body.replaceChildren(make("p.dim", "loading …"));
  if (!dialog.open) dialog.showModal();
  const repeat = async () => {
    let more = true;
    try {
      more = await load(() => shown === mine);
    } catch (error) {
      if (shown === mine) body.replaceChildren(make("p", error.message));
    }
    if (shown === mine && more) again = setTimeout(repeat, AGAIN_MS);
  };
  await repeat();
}

function refill(...nodes) { // an open table stays open, and what has the focus keeps it
  const { open } = body.querySelector("details") ?? {}, focused = body.contains(document.activeElement) && document.activeElement.id;
  body.replaceChildren(...nodes);
  body.querySelector("details").open = open ?? false;
  if (focused) find(focused)?.focus();
}

function factList(pairs) {
  const list = make("dl");
  for (const [name, value] of pairs) if (value !== null) list.append(make("div", make("dt", name), make("dd", value)));
  return list;
}

function tableOf(title, heads, rows) {
  const kept = rows.slice(0, MOST_ROWS).map((row) => make("tr", ...row.map((text) => make("td", text))));
  if (rows.length > MOST_ROWS) kept.push(make("tr", make("td", { colSpan: heads.length }, `and ${rows.length - MOST_ROWS} more`)));
  const head = make("tr", ...heads.map((text) => make("th", text)));
  return make("details", make("summary", { id: "as-table" }, title), make("table", make("thead", head), make("tbody", ...kept)));
}

// ---- a request

const LANES = { chunk: "chunks", recompute: "recomputed", export: "KV out", fetch: "KV in" };
const BAD = ["retry", "refused", "preempted"];

function wordsOf([kind, , attempt, , , , peer, first, last, size, note]) {
  const range = `${first} to ${last}`, tokens = `tokens ${range}, ${size} in the step`, by = `by ${peer}`;
  const text = {
    chunk: tokens, recompute: tokens, export: `KV chunk ${size}, blocks ${range}`, fetch: `from ${peer}, blocks ${range}, ${bytes(size)}`,
    offered: `to ${peer}`, granted: by, deferred: by, refused: by, migrated: `from ${peer}`, retry: `attempt ${attempt}`,
  }[kind];
  return [text, note].filter((part) => part).join(": ");
}

function spansOf(it) { // {lane, start, span, iid, what, more, tone}, by lane
  const stages = it.stages.map(([what, attempt, iid, start, span]) =>
    ({ lane: it.attempts > 1 ? `attempt ${attempt}` : "stages", start, span, iid, what, more: `attempt ${attempt}`, tone: what }));
  const events = it.events.map((event) => {
    const [what, , , start, iid, span] = event, lane = LANES[what] && `${iid} ${LANES[what]}`;
    return { lane: lane ?? "events", start, span, iid, what, more: wordsOf(event), tone: lane ? what : BAD.includes(what) ? "bad" : "event" };
  }).sort((a, b) => a.start - b.start);
  const steps = it.steps.map(([start, span, iid, tokens, batch, chunk]) =>
    ({ lane: `${iid} steps`, start, span, iid, what: "step", more: `${tokens} tokens, batch ${batch}${chunk ? `, beside a chunk of ${chunk}` : ""}`, tone: "decode" }));
  return [...stages, ...events.filter(({ lane }) => lane !== "events"), ...steps, ...events.filter(({ lane }) => lane === "events")];
}

function waterfall(spans, until) {
  const words = ({ what, iid, span, more }) => [what, iid, span ? seconds(span) : "", more].filter((part) => part).join(", ");
  const figure = make("div.waterfall", { role: "img", ariaLabel: `The first ${seconds(until)}. ${spans.filter(({ what, tone }) => what === tone).map(words).join("; ")}` });
  const lanes = new Map();
  const lane = (name, kind) => {
    if (!lanes.has(name)) {
      lanes.set(name, make(`div.track${kind}`));
      figure.append(make("div.lane", make("span.name", name), lanes.get(name)));
    }
    return lanes.get(name);
  };
  const place = (track, node, start, span) => {
    style(node, "left", `${(100 * start) / until}%`);
    if (span) style(node, "width", `${(100 * Math.min(span, until - start)) / until}%`);
    track.append(node);
  };
  for (let at = 0, step = ceiling(until / 5); at <= until * 1.0001; at += step) place(lane("", ".axis"), make("span", seconds(+at.toPrecision(6))), at);
  for (const it of spans.filter(({ start }) => start <= until)) {
    const label = it.what === it.tone && Math.min(it.span, until - it.start) > until * 90 / body.clientWidth ? it.what : "";
    const node = make(it.lane === "events" ? "i.point" : "i.bar", { title: `${words(it)}; at ${seconds(it.start)}` }, label);
    node.dataset.tone = it.tone;
    place(lane(it.lane, ""), node, it.start, it.span);
  }
  return figure;
}

function factsOf(it) {
  const got = it.receipt;
  return factList([
    ["ended", it.reason ?? `open: ${it.stage}`], ["TTFT", seconds(it.ttft_s)], ["TPOT", seconds(it.tpot_s)], ["JCT", seconds(it.jct_s)],
    ["limits", `TTFT ${seconds(it.slo.ttft_s)}, TPOT ${seconds(it.slo.tpot_s)}${it.slo_result && `: ${it.slo_result}`}`],
    ["prompt tokens", count(it.prompt_tokens)], ["output tokens", count(it.outputs)], ["attempts", count(it.attempts)],
    ["KV moved", got && got.kv_bytes != null ? `${bytes(got.kv_bytes)} over ${got.transport}` : null],
    ...["local", "adopted", "recomputed"].map((name) => [name, got && count(got[name])]), ["preempted", got?.preempted ? count(got.preempted) : null],
    ["error", it.error],
  ]);
}

function showTimeline(it, view) {
  const spans = spansOf(it), first = it.ttft_s, end = Math.max(it.jct_s ?? 1e-6, ...spans.map(({ start, span }) => start + span));
  const rows = [...spans].sort((a, b) => a.start - b.start).map(({ start, span, iid, what, more }) => [seconds(start), span ? seconds(span) : none, iid, what, more]);
  const views = [["whole", end, "The whole request"], ["first", first && first * 1.1, "Until the first token"]].filter(([, until]) => until);
  const until = (views.find(([name]) => name === view.name) ?? views[0])[1];
  const buttons = views.map(([name, , title]) => {
    const button = make("button", { type: "button", id: `view-${name}`, "aria-pressed": String((view.name ?? "whole") === name) }, title);
    button.addEventListener("click", () => { view.name = name; showTimeline(it, view); });
    return button;
  });
  const left = it.left_out ? [make("p.dim", `${count(it.left_out)} events and steps are not known`)] : [];
  refill(factsOf(it), make("p.views", ...buttons), waterfall(spans, until), ...left, tableOf("As a table", ["at", "took", "where", "what", "more"], rows));
}

export function explain(id) {
  const view = {};
  return present(`Request ${id}`, async (current) => {
    const it = await ask(`live/requests/${encodeURIComponent(id)}`);
    if (!current()) return false;
    if (it === null) body.replaceChildren(make("p", "No such request is known, or it ended too long ago."));
    else showTimeline(it, view);
    return it !== null && it.reason === null;
  });
}

// ---- an instance

const LOADS = [
  { title: "Requests", lines: ["running", "waiting", "queued"], values: (p) => [p.running, p.waiting, p.queued], show: count },
  { title: "KV used", lines: ["used"], values: (p) => [p.used], show: percent, top: 1 },
  { title: "Busy and chunk fill", lines: ["busy", "fill"], values: (p) => [p.busy, p.fill], show: percent, top: 1 },
  { title: "Batch", lines: ["batch"], values: (p) => [p.batch], show: short },
];
const HEADS = ["time", "role", "state", "queued", "waiting", "running", "KV used", "busy"];

function instanceFacts(it) {
  return factList([
    ["role", it.role], ["state", it.state], ["queue", `${count(it.queued)} prompts, ${count(it.queued_tokens)} tokens, ${seconds(it.queued_s)}`],
    ["decodes", `${it.running} running, ${it.waiting} waiting (${it.landed} with all KV), ${it.heavy} heavy`],
    ["KV blocks", `${count(it.blocks - it.free)} of ${count(it.blocks)}`], ["KV in", `${bytes(it.received_bytes_s)}/s`],
    ["busy", percent(it.busy)], ["chunk fill", percent(it.fill)], ["batch", short(it.batch)],
    ["step ratio", `prefill ${ratio(it.ratio.prefill)}, decode ${ratio(it.ratio.decode)}`], ["note", it.note || null],
  ]);
}

function loadRows(points) { // every tenth, newest first
  return points.filter((_, i) => (points.length - 1 - i) % 10 === 0).reverse().map((p) =>
    [new Date(p.at * 1000).toLocaleTimeString(), p.role, p.state, count(p.queued), count(p.waiting), count(p.running), percent(p.used), percent(p.busy)]);
}

export function instance(iid, latest) { // latest(iid): what the stream says now
  const charts = LOADS.map((load) => new Chart(load)), figures = make("div.charts", ...charts.map((chart) => chart.node));
  return present(`Instance ${iid}`, async (current) => {
    const found = await ask(`live/instances/${encodeURIComponent(iid)}`), it = latest(iid);
    if (!current()) return false;
    if (found === null || !it) {
      body.replaceChildren(make("p", "This instance is not in the deployment any more."));
      return false;
    }
    const points = found.points.map((p) => ({ ...p, used: it.blocks ? 1 - p.free / it.blocks : null }));
    const now = points.at(-1)?.at ?? 0, span = spanOf(points, now);
    refill(instanceFacts(it), figures, tableOf("As a table, every 10 s", HEADS, loadRows(points)));
    charts.forEach((chart) => chart.draw({ points, now, span }));
    return true;
  });
}
