// The dialogs: the waterfall of a request, and the load of an instance over time.

import { drawChart, spanOf } from "./charts.js";
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
  body.replaceChildren(make("p", { className: "dim" }, "loading …"));
  if (!dialog.open) dialog.showModal();
  const repeat = async () => {
    let more = true;
    try {
      more = await load(() => shown === mine);
    } catch (error) {
      if (shown === mine) body.replaceChildren(make("p", {}, error.message));
    }
    if (shown === mine && more) again = setTimeout(repeat, AGAIN_MS);
  };
  await repeat();
}

function factList(pairs) {
  const list = make("dl", { className: "list" });
  for (const [name, value] of pairs) if (value !== null) list.append(make("div", {}, make("dt", {}, name), make("dd", {}, value)));
  return list;
}

function tableOf(title, heads, rows) {
  const kept = rows.slice(0, MOST_ROWS).map((row) => make("tr", {}, ...row.map((text) => make("td", {}, text))));
  if (rows.length > MOST_ROWS) kept.push(make("tr", {}, make("td", { colSpan: heads.length }, `and ${rows.length - MOST_ROWS} more`)));
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...heads.map((text) => make("th", { scope: "col" }, text)))), make("tbody", {}, ...kept));
  return make("details", {}, make("summary", {}, title), table);
}

// ---- a request

const INSTANTS = ["offered", "granted", "deferred", "refused", "preempted", "retry", "migrated"];

function wordsOf([kind, , attempt, , , , peer, first, last, size, note]) {
  const with_ = {
    chunk: `tokens ${first} to ${last}, ${size} in the step`, recompute: `tokens ${first} to ${last} again, ${size} in the step`,
    export: `KV chunk ${size}, blocks ${first} to ${last}`, fetch: `from ${peer}, blocks ${first} to ${last}, ${bytes(size)}`,
    offered: `to ${peer}`, granted: `by ${peer}`, deferred: `by ${peer}`, refused: `by ${peer}`, migrated: `from ${peer}`,
    retry: `attempt ${attempt + 1}`,
  }[kind];
  return [with_, note].filter((part) => part).join(": ");
}

function lanesOf(it) { // name -> bars: {start, seconds, tone, text}
  const lanes = new Map();
  const add = (name, bar) => lanes.set(name, [...(lanes.get(name) ?? []), bar]);
  for (const [stage, attempt, iid, start, span] of it.stages) {
    const text = `${stage}${iid ? ` on ${iid}` : ""}, ${seconds(span)}`;
    add(it.attempts > 1 ? `attempt ${attempt + 1}` : "stages", { start, seconds: span, tone: stage, text, label: stage });
  }
  const events = [...it.events].sort((a, b) => a[3] - b[3]);
  for (const event of events) {
    const [kind, , , start, iid, span] = event, text = `${kind} ${wordsOf(event)}${span ? `, ${seconds(span)}` : ""}`;
    if (INSTANTS.includes(kind)) continue;
    const name = { chunk: "chunks", recompute: "recomputed", export: "KV out", fetch: "KV in" }[kind] ?? kind;
    add(`${iid} ${name}`, { start, seconds: span, tone: kind, text });
  }
  for (const [start, span, iid, tokens, batch, chunk] of it.steps) {
    add(`${iid} steps`, { start, seconds: span, tone: "decode", text: `${tokens} tokens in ${seconds(span)}, batch ${batch}${chunk ? `, beside a chunk of ${chunk}` : ""}` });
  }
  for (const event of events.filter(([kind]) => INSTANTS.includes(kind))) {
    const bad = ["retry", "refused", "preempted"].includes(event[0]);
    add("events", { start: event[3], seconds: 0, tone: bad ? "bad" : "instant", text: `${event[0]} ${wordsOf(event)}` });
  }
  return lanes;
}

function endOf(it) {
  const ends = [...it.stages.map((s) => s[3] + s[4]), ...it.events.map((e) => e[3] + e[5]), ...it.steps.map((s) => s[0] + s[1])];
  return Math.max(it.jct_s ?? 0, 1e-6, ...ends);
}

function tickOf(until) {
  const unit = 10 ** Math.floor(Math.log10(until / 4));
  return [1, 2, 5, 10].map((n) => n * unit).find((step) => until / step <= 5);
}

function waterfall(it, until) {
  const figure = make("div", { className: "waterfall", role: "img" });
  figure.setAttribute("aria-label", `Waterfall of ${seconds(until)}: ${it.stages.map(([s, , iid, , span]) => `${s} ${iid} ${seconds(span)}`).join(", ")}`);
  const place = (node, start, span) => {
    style(node, "left", `${(100 * start) / until}%`);
    if (span) style(node, "width", `${(100 * Math.min(span, until - start)) / until}%`);
    return node;
  };
  const axis = make("div", { className: "track axis" });
  for (let at = 0, step = tickOf(until); at <= until * 1.0001; at += step) axis.append(place(make("span", {}, seconds(+at.toPrecision(6))), at));
  figure.append(make("div", { className: "lane" }, make("span", { className: "name" }), axis));
  for (const [name, bars] of lanesOf(it)) {
    const track = make("div", { className: "track" });
    for (const bar of bars) {
      if (bar.start > until) continue;
      const wide = Math.min(bar.seconds, until - bar.start) / until > 0.09;
      const node = make("i", { className: bar.seconds || bar.label ? "bar" : "point", title: `${bar.text}; at ${seconds(bar.start)}` }, wide && bar.label ? bar.label : "");
      node.dataset.tone = bar.tone;
      track.append(place(node, bar.start, bar.seconds));
    }
    figure.append(make("div", { className: "lane" }, make("span", { className: "name" }, name), track));
  }
  return figure;
}

function rowsOf(it) {
  const rows = it.stages.map(([stage, attempt, iid, start, span]) => [start, span, iid, stage, `attempt ${attempt + 1}`]);
  rows.push(...it.events.map((e) => [e[3], e[5], e[4], e[0], wordsOf(e)]));
  rows.push(...it.steps.map(([start, span, iid, tokens, batch]) => [start, span, iid, "step", `${tokens} tokens, batch ${batch}`]));
  return rows.sort((a, b) => a[0] - b[0]).map(([start, span, ...rest]) => [seconds(start), span ? seconds(span) : none, ...rest]);
}

function factsOf(it) {
  const tpot = it.reason && it.outputs > 1 && it.ttft_s != null ? (it.jct_s - it.ttft_s) / (it.outputs - 1) : null, got = it.receipt;
  return factList([
    ["ended", it.reason ?? `open: ${it.stage}`], ["TTFT", seconds(it.ttft_s)], ["TPOT", seconds(tpot)], ["JCT", seconds(it.jct_s)],
    ["tokens in", count(it.prompt_tokens)], ["out", count(it.outputs)], ["attempts", count(it.attempts)],
    ["KV moved", got && got.kv_bytes != null ? `${bytes(got.kv_bytes)} over ${got.transport}` : null],
    ["adopted", got && got.adopted != null ? count(got.adopted) : null], ["recomputed", got && got.recomputed != null ? count(got.recomputed) : null],
    ["preempted", got?.preempted ? count(got.preempted) : null], ["error", it.error ?? null],
  ]);
}

function showTimeline(it, view) {
  const end = endOf(it), first = it.ttft_s;
  const views = [["whole", end, "The whole request"], ["first", first && first * 1.1, "Until the first token"]].filter(([, until]) => until);
  const until = (views.find(([name]) => name === view.name) ?? views[0])[1];
  const buttons = views.map(([name, , title]) => {
    const button = make("button", { type: "button", "aria-pressed": String((view.name ?? "whole") === name) }, title);
    button.addEventListener("click", () => {
      view.name = name;
      showTimeline(it, view);
      body.querySelector("[aria-pressed=true]")?.focus();
    });
    return button;
  });
  const left = it.left_out ? [make("p", { className: "dim" }, `${count(it.left_out)} events and steps were not kept`)] : [];
  const opened = body.querySelector("details")?.open ?? false;
  const table = tableOf("As a table", ["at", "took", "where", "what", "more"], rowsOf(it));
  table.open = opened;
  body.replaceChildren(factsOf(it), make("p", { className: "views" }, ...buttons), waterfall(it, until), ...left, table);
}

async function timeline(id) { // the id of a further choice ends with its number
  const path = (rid, choice) => `live/requests/${encodeURIComponent(rid)}?choice=${choice}`;
  const [, rid, choice] = /^(.+)\.(\d+)$/.exec(id) ?? [];
  return (await ask(path(id, 0))) ?? (rid ? ask(path(rid, choice)) : null);
}

export function explain(id) {
  const view = {};
  return present(`Request ${id}`, async (current) => {
    const it = await timeline(id);
    if (!current()) return false;
    if (it === null) body.replaceChildren(make("p", {}, "No such request is known: it never was, or it ended too long ago."));
    else if (!body.contains(document.activeElement) || document.activeElement === body || !view.shown) showTimeline(it, view);
    view.shown = true;
    return it !== null && it.reason === null;
  });
}

// ---- an instance

const LOADS = [
  { title: "Requests", lines: ["running", "waiting", "queued"], show: short },
  { title: "KV memory in use", lines: ["used"], show: percent, top: 1 },
  { title: "Busy and chunk fill", lines: ["busy", "fill"], show: percent, top: 1 },
  { title: "Batch", lines: ["batch"], show: short },
];

function instanceFacts(it) {
  return factList([
    ["role", it.role], ["state", it.state], ["queue", `${count(it.queued)} prompts, ${count(it.queued_tokens)} tokens, ${seconds(it.queued_s)}`],
    ["decodes", `${it.running} running, ${it.waiting} waiting (${it.landed} with all KV), ${it.heavy} heavy`],
    ["KV blocks", `${count(it.blocks - it.free)} of ${count(it.blocks)}`], ["KV in", `${bytes(it.received_bytes_s)}/s`],
    ["busy", percent(it.busy)], ["chunk fill", percent(it.fill)], ["batch", short(it.batch)],
    ["step, measured over predicted", `prefill ${ratio(it.ratio.prefill)}, decode ${ratio(it.ratio.decode)}`], ["note", it.note || null],
  ]);
}

function loadFigures(points, now) {
  const span = spanOf(points, now), figures = make("div", { className: "charts" }), draws = [];
  for (const { title, lines, show, top } of LOADS) {
    const canvas = make("canvas", { role: "img", "aria-label": `${title}: ${lines.map((name) => `${name} ${show(points.at(-1)?.[name])}`).join(", ")}` });
    const legend = lines.map((name, i) => make("span", { className: `line-${i}` }, `${name} `, make("b", {}, show(points.at(-1)?.[name]))));
    figures.append(make("figure", { className: "panel" }, make("figcaption", {}, make("h3", {}, title), make("span", { className: "values" }, ...legend)), canvas));
    draws.push(() => drawChart(canvas, { lines: lines.map((name) => points.map((p) => [p.at, p[name] ?? null])), tones: ["line-0", "line-1", "line-2"], show, now, span, top }));
  }
  return [figures, () => draws.forEach((draw) => draw())];
}

export function instance(iid, latest) { // latest(iid): what the stream says now
  return present(`Instance ${iid}`, async (current) => {
    const found = await ask(`live/instances/${encodeURIComponent(iid)}`), it = latest(iid);
    if (!current()) return false;
    if (found === null || !it) {
      body.replaceChildren(make("p", {}, "This instance is not part of the deployment any more."));
      return false;
    }
    const points = found.points.map((p) => ({ ...p, used: it.blocks ? 1 - p.free / it.blocks : null }));
    const [figures, draw] = loadFigures(points, points.at(-1)?.at ?? 0);
    const opened = body.querySelector("details")?.open ?? false, focused = document.activeElement?.tagName === "SUMMARY";
    const rows = points.filter((_, i) => (points.length - 1 - i) % 10 === 0).reverse()
      .map((p) => [new Date(p.at * 1000).toLocaleTimeString(), p.role, p.state, count(p.queued), count(p.waiting), count(p.running), percent(p.used), percent(p.busy)]);
    const table = tableOf("As a table, every 10 s", ["time", "role", "state", "queued", "waiting", "running", "KV", "busy"], rows);
    table.open = opened;
    body.replaceChildren(instanceFacts(it), figures, table);
    draw();
    if (focused) table.firstChild.focus();
    return true;
  });
}
