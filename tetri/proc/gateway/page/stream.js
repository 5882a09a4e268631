// Reads /live, connects again by itself, and asks for the API key when the server does.

const SILENT_MS = 5000; // the server writes at least once a second
const LONGEST_MS = 5000; // between two tries
const KEY = "tetri-api-key";

let refused = null; // called with whether a key was given and not accepted

export const onRefused = (call) => { refused = call; };
export const keep = (key) => sessionStorage.setItem(KEY, key);
export const hasKey = () => sessionStorage.getItem(KEY) !== null;

function get(path, signal) {
  const key = sessionStorage.getItem(KEY);
  const headers = key === null ? {} : { Authorization: `Bearer ${key}` };
  return fetch(path, { headers, signal, cache: "no-store" });
}

export async function ask(path) { // one JSON object; null: there is none
  const answer = await get(path);
  if (answer.status === 404) return null;
  if (answer.status === 401) refused(hasKey());
  if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
  return answer.json();
}

async function read(body, live, message) { // calls message with each object
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    live();
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) message(JSON.parse(line.slice(5)));
    }
  }
}

export class Stream {
  // began(): connected, the next message has the whole state; message(data); lost(why): trying again
  constructor({ began, message, lost }) {
    Object.assign(this, { began, message, lost, running: null, failures: 0, timer: 0 });
    document.addEventListener("visibilitychange", () => (document.hidden ? this.stop() : this.start()));
  }

  start() {
    if (this.running || document.hidden) return;
    clearTimeout(this.timer);
    this.running = new AbortController();
    this.follow(this.running);
  }

  stop() { // a hidden page does nothing
    clearTimeout(this.timer);
    this.running?.abort();
    this.running = null;
  }

  async follow(control) {
    let watch = 0;
    const live = () => {
      clearTimeout(watch);
      watch = setTimeout(() => control.abort(), SILENT_MS);
    };
    let why = "the connection ended";
    try {
      live();
      const answer = await get("live", control.signal);
      if (answer.status === 401) {
        this.running = null;
        return refused(hasKey());
      }
      if (answer.ok) {
        this.began();
        await read(answer.body, live, (data) => { this.failures = 0; this.message(data); });
      } else {
        why = answer.status === 503 ? "too many pages are open" : `the server answered ${answer.status}`;
      }
    } catch (error) {
      if (!(error instanceof DOMException || error instanceof TypeError)) console.error(error);
      why = "the server does not answer";
    } finally {
      clearTimeout(watch);
    }
    if (this.running !== control) return; // stopped on purpose
    this.running = null;
    this.lost(why);
    this.timer = setTimeout(() => this.start(), Math.min(500 * 2 ** this.failures++, LONGEST_MS));
  }
}
