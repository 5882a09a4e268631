// The list of recent requests: open ones first, then ended ones, newest first.

import { ENDS, count, find, fit, make, mark, none, seconds, write } from "./dom.js";

const OPEN = 6, ROWS = 60; // rows
const FAILED = { cancelled: "cancelled", deadline: "failed", error: "failed" };

const open = new Map(); // id -> row of an open choice, last moved last
let ended = []; // rows, newest first
let looking = false, explain = null;

const list = find("rows");
for (const [event, state] of [["pointerenter", true], ["pointerleave", false], ["focusin", true], ["focusout", false]]) {
  list.addEventListener(event, () => { looking = state; });
}

export const onExplain = (call) => { explain = call; };

export function forget() {
  open.clear();
  ended = [];
}

export const forgetOpen = () => open.clear();

export function note({ moves, ended: ends }) {
  for (const [rid, stage, iid, , attempt] of moves) {
    const places = new Set([...(open.get(rid)?.places ?? []), ...(iid ? [iid] : [])]);
    open.delete(rid);
    if (!ENDS.includes(stage)) open.set(rid, { rid, stage, attempts: attempt, places });
  }
  for (const it of ends) {
    open.delete(it.rid);
    const places = [it.prefill, it.decode].filter((iid) => iid);
    ended.unshift({ ...it, stage: FAILED[it.reason] ?? "done", places: new Set(places) });
  }
  ended.length = Math.min(ended.length, ROWS);
}

function makeRow() {
  const button = make("button.rid", { type: "button" });
  const row = make("tr", make("th", { scope: "row" }, button), ...Array.from({ length: 8 }, () => make("td")));
  row.addEventListener("click", () => explain(button.dataset.rid));
  return row;
}

function fillRow(row, it) {
  const button = row.cells[0].firstChild;
  mark(button, "rid", it.rid);
  button.title = it.rid;
  mark(row, "stage", it.stage);
  const reason = it.reason && it.stage !== "done" && it.reason !== it.stage ? `, ${it.reason}` : "";
  const cells = [it.rid, it.stage + reason, seconds(it.ttft_s), seconds(it.tpot_s), seconds(it.jct_s), count(it.prompt_tokens),
    count(it.outputs), count(it.attempts), [...it.places].join(" → ") || none];
  cells.forEach((text, i) => write(i ? row.cells[i] : button, text));
}

export function show() {
  const rows = [...[...open.values()].slice(-OPEN).reverse(), ...ended].slice(0, ROWS);
  find("empty").hidden = rows.length > 0;
  list.hidden = rows.length === 0;
  const held = looking && list.matches(":hover, :focus-within");
  find("held").hidden = !held;
  if (held) return;
  fit(find("requests"), rows.length, makeRow).forEach((row, i) => fillRow(row, rows[i]));
}
