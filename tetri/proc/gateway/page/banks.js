// The instances as cards in banks: prefill left, decode right, mixed between.

import { bytes, count, find, make, mark, percent, ratio, seconds, short, style, write } from "./dom.js";

const MARKS = 40; // at most so many marks have their full width
const cards = new Map(); // iid -> Card
const order = new Intl.Collator("en", { numeric: true });

class Card {
  constructor(iid, open) {
    this.iid = iid;
    const part = (name) => (this[name] = make(`span.${name}`));
    const fact = (label, name, more = "") => make(`span.fact.${name}-fact`, make("span.label", label, make("span.more", more), " "), part(name));
    this.button = make("button.card", { type: "button" },
      make("span.top", make("b", iid), " ", part("role"), " ", fact("busy", "busy")),
      make("span.load", part("loadBar")),
      make("span.memory", part("memoryBar")),
      make("span.facts", fact("KV", "kv", " used"), " ", make("span.label", part("blocks"), make("span.unit", " blocks"))),
      make("span.marks", part("queuedMarks"), part("heavyMarks"), part("lightMarks"), part("waitingMarks")),
      make("span.facts.words", part("decodes")),
      make("span.facts.grid", fact("queue", "queue", " time"), " ", fact("fill", "fill"), " ", fact("batch", "batch"), " ", fact("step", "step", " ratio")));
    this.button.addEventListener("click", () => open(iid));
    this.button.id = `card-${iid}`;
    this.item = make("li", this.button);
  }

  show(it) {
    if (this.was && this.was !== it.role) this.changed();
    this.was = it.role;
    const used = it.blocks ? (it.blocks - it.free) / it.blocks : 0;
    const light = Math.max(0, it.running + it.waiting - it.heavy);
    mark(this.button, "role", it.role);
    mark(this.button, "state", it.state);
    write(this.role, it.state !== "ready" ? it.state : it.keeps ? `${it.role} (${it.keeps})` : it.role);
    const busy = it.state === "ready" ? it.busy : null;
    write(this.busy, percent(busy));
    style(this.loadBar, "--part", (busy ?? 0).toFixed(2));
    write(this.kv, percent(used));
    style(this.memoryBar, "--part", used.toFixed(3));
    write(this.blocks, `${count(it.blocks - it.free)} / ${count(it.blocks)}`);
    this.marks(it, light);
    write(this.decodes, it.note || this.words(it, light));
    mark(this.decodes, "noted", it.note !== "");
    write(this.queue, seconds(it.queued_s));
    write(this.fill, percent(it.fill));
    write(this.batch, short(it.batch));
    write(this.step, this.steps(it));
    this.button.title = it.note;
  }

  marks(it, light) { // heavy and light include those that wait: so many marks are hollow
    const all = it.queued + it.heavy + light;
    style(this.queuedMarks.parentNode, "--step", all > MARKS ? (MARKS / all).toFixed(3) : 1);
    style(this.queuedMarks, "--n", it.queued);
    style(this.heavyMarks, "--n", it.heavy);
    style(this.lightMarks, "--n", light);
    style(this.waitingMarks, "--n", it.waiting);
  }

  words(it, light) {
    const counts = Object.entries({ queued: it.queued, heavy: it.heavy, light, waiting: it.waiting });
    return counts.filter(([, n]) => n).map(([name, n]) => `${n}\u00a0${name}`).join(" · ") || "no request";
  }

  steps(it) { // measured over predicted
    const { prefill, decode } = it.ratio, both = [prefill, decode].filter((x) => x != null);
    return it.role in it.ratio ? ratio(it.ratio[it.role]) : both.map(ratio).join(" · ") || ratio();
  }

  changed() {
    this.button.classList.add("changed");
    setTimeout(() => this.button.classList.remove("changed"), 3000);
  }
}

function fill(role, wanted) { // cards stay where they are, unless they are new here
  const bank = find(`bank-${role}`);
  wanted.forEach((card, i) => {
    if (bank.children[i] !== card.item) {
      const focused = card.button === document.activeElement;
      bank.insertBefore(card.item, bank.children[i] ?? null);
      if (focused) card.button.focus({ preventScroll: true });
    }
  });
  while (bank.children.length > wanted.length) bank.lastChild.remove();
  mark(bank, "size", wanted.length <= 3 ? "large" : wanted.length <= 12 ? "medium" : "small");
  return wanted.length;
}

export function showInstances(instances, open) { // returns whether anything has moved
  const known = new Set(instances.map((it) => it.iid));
  for (const [iid, card] of cards) {
    if (!known.has(iid)) { card.item.remove(); cards.delete(iid); }
  }
  const banks = { prefill: [], mixed: [], decode: [] };
  for (const it of [...instances].sort((a, b) => order.compare(a.iid, b.iid))) {
    if (!cards.has(it.iid)) cards.set(it.iid, new Card(it.iid, open));
    const card = cards.get(it.iid);
    card.show(it);
    (banks[it.role] ?? banks.mixed).push(card);
  }
  const sizes = Object.entries(banks).map(([role, wanted]) => fill(role, wanted));
  const [prefill, mixed, decode] = sizes;
  find("bank-mixed").hidden = mixed === 0;
  write(find("h-mixed"), mixed ? "Both" : "KV");
  mark(find("banks"), "mixed", mixed === 0 ? "none" : prefill + decode === 0 ? "all" : "some");
  write(find("n-bytes"), `${bytes(instances.reduce((sum, it) => sum + it.received_bytes_s, 0))}/s`);
  return sizes.join();
}

export const cardOf = (iid) => cards.get(iid)?.button;
