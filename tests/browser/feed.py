"""An HTTP server with the live page and a made-up deployment behind it: for tests of the page, and to work on it.

    python tests/browser/feed.py --instances 64 --rate 30 --faults      # then open the address that it prints

What /live says is made by `World`, which only tests and this program use: the page cannot tell it from a gateway.
"""

from __future__ import annotations

import argparse
import json
import random
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from tetri.proc.gateway.page_files import FOLDER as PAGE
from tetri.proc.gateway.page_files import POLICY, TYPES

TICK_S = 0.2
BLOCKS = 2048
KEPT_POINTS = 600
KEPT_ENDS = 200
BATCH = 32  # decodes in one batch
LIMITS = {"ttft_s": 0.25, "tpot_s": 0.055}  # of every request


@dataclass
class Request:
    """A choice, with the stages that it will go through: (stage, instance, since its arrival)."""

    rid: str
    born: float
    prompt: int
    outputs: int
    tpot: float
    plan: list[tuple[str, str, float]]
    heavy: bool
    attempts: int = 1
    at: int = -1  # position in the plan

    @property
    def stage(self) -> str:
        return self.plan[self.at][0]

    @property
    def iid(self) -> str:
        return self.plan[self.at][1]

    def kept(self, ttft: float) -> str:
        late, slow = ttft > LIMITS["ttft_s"], self.tpot > LIMITS["tpot_s"]
        return "both" if late and slow else "ttft" if late else "tpot" if slow else "met"

    def written(self, now: float) -> int:
        begun = next((start for stage, _, start in self.plan if stage == "decode"), 1e9)
        return max(0, min(self.outputs, int((now - self.born - begun) / self.tpot)))


@dataclass
class Instance:
    iid: str
    role: str
    state: str = "ready"
    note: str = ""
    points: deque = field(default_factory=lambda: deque(maxlen=KEPT_POINTS))


class World:
    """Instances, and requests that pass through them at `rate` a second. Nothing of it is drawn from the clock."""

    def __init__(self, instances: int = 4, rate: float = 0.0, seed: int = 1) -> None:
        self.rng, self.rate, self.epoch = random.Random(seed), rate, 1
        self.model, self.notes, self.serial = "smollm2-135m", [], 0
        prefill = instances * 3 // 8 if instances > 4 else instances // 2
        roles = ["mixed"] if instances == 1 else ["prefill"] * prefill + ["decode"] * (instances - prefill)
        counts = {"prefill": 0, "decode": 0, "mixed": 0}
        self.instances: dict[str, Instance] = {}
        for role in roles:
            iid = f"{role[0]}{counts[role]}"
            counts[role] += 1
            self.instances[iid] = Instance(iid, role)
        self.open: dict[str, Request] = {}
        self.known: dict[str, Request] = {}
        self.ended: deque = deque(maxlen=KEPT_ENDS)  # (at, Ended)
        self.events: deque = deque(maxlen=100)  # (at, kind, iid, note)
        self.points: deque = deque(maxlen=KEPT_POINTS)
        self.new_moves: list = []
        self.new_ended: list = []
        self.new_events: list = []
        self.due = 0.0
        self.last_point = 0.0

    # ---- what happens

    def event(self, now: float, kind: str, iid: str, note: str) -> None:
        self.events.append((now, kind, iid, note))
        self.new_events.append([kind, iid, 0.0, note])

    def flip(self, now: float, iid: str, role: str) -> None:
        was, self.instances[iid].role = self.instances[iid].role, role
        self.event(now, "role", iid, f"{was} to {role}: the monitor asked for it")

    def kill(self, now: float, iid: str) -> None:
        self.instances[iid].state, self.instances[iid].note = "lost", "no heartbeat for 2 s"
        self.event(now, "lost", iid, "no heartbeat for 2 s")
        for it in [each for each in self.open.values() if each.iid == iid]:
            self.submit(now, it.rid, it.attempts)

    def submit(self, now: float, rid: str = "", attempts: int = 0) -> Request:
        rng, ready = self.rng, [it for it in self.instances.values() if it.state == "ready"]
        first = rng.choice([it.iid for it in ready if it.role != "decode"] or ["d0"])
        second = rng.choice([it.iid for it in ready if it.role != "prefill"] or ["p0"])
        self.serial += 1
        prompt, outputs = int(rng.lognormvariate(6, 0.8)), 2 + int(rng.lognormvariate(4.2, 0.7))
        queued, prefill, moving = rng.expovariate(12), prompt * 2e-4 + 0.02, 0.004 + prompt * 1e-5
        times = [
            0.0,
            queued,
            queued + prefill,
            queued + prefill + moving,
            queued + prefill + moving + rng.expovariate(60),
        ]
        stages = zip(
            ("queued", "prefill", "moving", "waiting", "decode"), (first,) * 3 + (second,) * 2, times, strict=True
        )
        tpot = rng.uniform(0.025, 0.06)
        end = rng.choices(["done", "failed", "cancelled"], [97, 1, 2])[0]
        plan = [*stages, (end, second, times[-1] + outputs * tpot)]
        rid = rid or f"{self.rng.getrandbits(64):016x}"
        made = Request(rid, now, prompt, outputs, tpot, plan, outputs > 128, attempts + 1)
        self.open[rid] = self.known[rid] = made
        return made

    def advance(self, now: float) -> None:
        """Everything up to `now`."""
        self.due = self.due or now
        while self.rate and self.due <= now:
            self.submit(self.due)
            self.due += self.rng.expovariate(self.rate)
        for it in [*self.open.values()]:
            while it.at + 1 < len(it.plan) and it.born + it.plan[it.at + 1][2] <= now:
                it.at += 1
                at = it.born + it.plan[it.at][2]
                self.new_moves.append([it.rid, it.stage, it.iid, now - at, it.attempts, it.written(now)])
            if it.at == len(it.plan) - 1:
                del self.open[it.rid]
                self.end(it)
        self.new_moves.sort(key=lambda move: -move[3])

    def end(self, it: Request) -> None:
        ttft, jct = it.plan[2][2], it.plan[-1][2]
        reason = {"done": "length", "failed": "error"}.get(it.stage, it.stage)
        fields = {"rid": it.rid, "reason": reason, "age_s": 0.0, "ttft_s": ttft, "tpot_s": it.tpot, "jct_s": jct}
        fields |= {"prompt_tokens": it.prompt, "outputs": it.outputs, "attempts": it.attempts}
        fields |= {"prefill": it.plan[0][1], "decode": it.plan[-1][1], "slo": LIMITS, "slo_result": it.kept(ttft)}
        self.ended.append((it.born + jct, fields))
        self.new_ended.append(fields)

    # ---- what is told

    def instance(self, it: Instance, now: float) -> dict:
        here = [each for each in self.open.values() if each.iid == it.iid]
        decodes = [each for each in here if each.stage in ("waiting", "decode")]
        running = min(BATCH, sum(each.stage == "decode" for each in decodes))
        queued = [each for each in here if each.stage in ("queued", "prefill")]
        used = sum((each.prompt + each.written(now)) // 16 + 1 for each in here)
        lost, prefill, decode = it.state == "lost", it.role != "decode", it.role != "prefill"
        jitter = random.Random(f"{it.iid} {int(now)}").uniform(0.96, 1.08)
        return {
            "iid": it.iid, "role": it.role, "keeps": "", "state": it.state, "note": it.note,
            "blocks": BLOCKS,
            "free": max(0, BLOCKS - used), "queued": len(queued), "queued_tokens": sum(each.prompt for each in queued),
            "queued_s": sum(each.prompt for each in queued) * 2e-4, "waiting": len(decodes) - running, "landed": 0,
            "running": running, "heavy": sum(each.heavy for each in decodes),
            "busy": 0.0 if lost else min(1.0, 0.3 * len(queued) + 0.035 * running),
            "fill": min(1.0, 0.35 + 0.2 * len(queued)) if prefill and queued else None,
            "batch": running * jitter if decode and running else None,
            "ratio": {"prefill": jitter if prefill else None, "decode": 2 - jitter if decode else None},
            "received_bytes_s": 0.0 if lost or not decode else running * 4e5 * jitter,
        }  # fmt: skip

    def point(self, now: float) -> dict:
        recent = [fields for at, fields in self.ended if at > now - 3]
        ranks = {name: sorted(each[name] for each in recent) for name in ("ttft_s", "tpot_s")}
        ends = {name: [values[len(values) // 2], values[-1]] if values else None for name, values in ranks.items()}
        tokens = sum(1 / each.tpot for each in self.open.values() if each.stage == "decode")
        kept = sum(each["slo_result"] == "met" for each in recent)
        queue = [0.08 + 0.02 * len(recent), 0.09 + 0.018 * len(recent)] if recent else None
        return {"at": now, "ttft": ends["ttft_s"], "tpot": ends["tpot_s"], "tokens_s": tokens,
                "requests_s": len(recent) / 3, "queue": queue, "goodput": kept / 3,
                "attainment": kept / len(recent) if recent else None}  # fmt: skip

    def message(self, now: float) -> dict:
        """What has happened since the message before."""
        self.advance(now)
        shown = [self.instance(it, now) for it in self.instances.values()]
        point = None
        if now - self.last_point >= 1:
            point, self.last_point = self.point(now), now
            self.points.append(point)
            names = ("role", "state", "queued", "waiting", "running", "free", "busy", "fill", "batch")
            for told in shown:
                self.instances[told["iid"]].points.append({"at": now} | {name: told[name] for name in names})
        stages = ("queued", "prefill", "moving", "waiting", "decode")
        requests = {stage: sum(it.stage == stage for it in self.open.values() if it.at >= 0) for stage in stages}
        made = {"epoch": self.epoch, "now": now, "model": self.model, "version": "0.9.0", "notes": self.notes}
        made |= {"monitor": {"age_s": 0.1, "flip": "auto", "number": 1}, "requests": requests, "instances": shown}
        made |= {
            "moves": self.new_moves,
            "ended": self.new_ended,
            "events": self.new_events,
            "missed": 0,
            "point": point,
        }
        self.new_moves, self.new_ended, self.new_events = [], [], []
        return made

    def first(self, message: dict) -> dict:
        """The same for who has just come."""
        now = message["now"]
        moves = [[it.rid, it.stage, it.iid, 0.0, it.attempts, 0] for it in self.open.values() if it.at >= 0]
        told = [*self.ended][: len(self.ended) - len(self.new_ended)]  # the others are in the next message
        ended = [fields | {"age_s": now - at} for at, fields in told]
        told = [*self.events][: len(self.events) - len(self.new_events)]
        events = [[kind, iid, now - at, note] for at, kind, iid, note in told]
        return message | {"moves": moves, "ended": ended, "events": events, "history": [*self.points]}

    def timeline(self, rid: str, choice: int, now: float) -> dict | None:
        it = self.known.get(rid)
        if it is None or choice:
            return None
        done = it.at == len(it.plan) - 1
        age = now - it.born
        ends = [start for _, _, start in it.plan[1:]]
        spans = [[stage, it.attempts, iid, start, min(end, age) - start]
                 for (stage, iid, start), end in zip(it.plan, ends, strict=False) if start < age]  # fmt: skip
        first, second, where = it.plan[0][1], it.plan[-1][1], it.attempts
        begun, ready, begin = it.plan[1][2], it.plan[2][2], it.plan[4][2]
        chunks = -(-it.prompt // 512)
        each = (ready - begun) / chunks
        events = [["offered", rid, where, begun, first, 0.0, second, 0, 0, 0, ""],
                  ["granted", rid, where, begun + 0.002, first, 0.0, second, 0, 0, 0, ""]]  # fmt: skip
        for i in range(chunks):
            start, tokens = begun + i * each, (i * 512, min(it.prompt, i * 512 + 512))
            events.append(["chunk", rid, where, start, first, each * 0.96, "", *tokens, tokens[1] - tokens[0], ""])
            events.append(["export", rid, where, start + each * 0.97, first, 0.001, "", i * 32, i * 32 + 32, i, ""])
            events.append(
                ["fetch", rid, where, start + each, second, 0.003, first, i * 32, i * 32 + 32, 1 << 20, "shm"]
            )
        if it.attempts > 1:
            events.append(["retry", rid, where, 0.0, "broker", 0.0, "", 0, 0, 0, "worker_lost"])
        steps = [[begin + i * it.tpot, it.tpot * 0.93, second, 1, 8, 0, 1] for i in range(it.written(now))]
        return {"rid": rid, "choice": choice, "choices": 1, "age_s": age, "prompt_tokens": it.prompt,
                "outputs": it.written(now), "attempts": it.attempts, "stage": it.stage, "error": None,
                "reason": {"done": "length", "failed": "error"}.get(it.stage, it.stage) if done else None,
                "ttft_s": ready if age > ready else None, "tpot_s": it.tpot, "jct_s": it.plan[-1][2] if done else None,
                "receipt": {"prompt_tokens": it.prompt, "local": 0, "adopted": it.prompt, "recomputed": 0,
                            "chunks": chunks, "kv_bytes": it.prompt * 24576, "transport": "shm", "preempted": 0}
                if done else None,
                "stages": spans, "events": [event for event in events if event[3] <= age], "steps": steps,
                "slo": LIMITS, "slo_result": it.kept(ready) if done else "", "left_out": 0}  # fmt: skip


class Feed:
    """The server. `world` is behind `lock`; `key`: what it asks for, if not empty. `broken`: it answers nothing."""

    def __init__(self, world: World, key: str = "", port: int = 0) -> None:
        self.world, self.key, self.broken = world, key, False
        self.lock, self.tick = threading.Lock(), threading.Condition()
        self.message: dict = {}
        self.number, self.running, self.watchers = 0, True, 0
        feed = self

        class Handler(_Handler):
            of = feed

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        self.threads = [
            threading.Thread(target=self._tick),
            threading.Thread(target=self.server.serve_forever, args=(0.02,)),
        ]

    def _tick(self) -> None:
        while self.running:
            with self.lock:
                made = self.world.message(time.time())
            with self.tick:
                self.message, self.number = made, self.number + 1
                self.tick.notify_all()
            time.sleep(TICK_S)

    def start(self) -> None:
        with self.lock:
            self.message = self.world.message(time.time())
        for thread in self.threads:
            thread.start()

    def close(self) -> None:
        self.running = False
        with self.tick:
            self.tick.notify_all()
        self.server.shutdown()
        self.server.server_close()
        for thread in self.threads:
            thread.join()

    def flip(self, iid: str, role: str) -> None:
        with self.lock:
            self.world.flip(time.time(), iid, role)

    def kill(self, iid: str) -> None:
        with self.lock:
            self.world.kill(time.time(), iid)


class _Handler(BaseHTTPRequestHandler):
    of: Feed

    def log_message(self, format: str, *arguments: object) -> None:
        """No access log."""

    def do_GET(self) -> None:
        asked = urlsplit(self.path)
        name = asked.path.lstrip("/") or "index.html"
        if self.of.broken:
            self.close_connection = True
        elif (PAGE / name).is_file() and "/" not in name:
            self._answer(200, (PAGE / name).read_bytes(), TYPES[(PAGE / name).suffix])
        elif not asked.path.startswith("/live"):
            self._answer(404, b"{}")
        elif self.of.key and self.headers["Authorization"] != f"Bearer {self.of.key}":
            self._answer(401, b"{}")
        elif name == "live":
            self.of.watchers += 1
            with suppress(OSError):
                self._live()
            self.of.watchers -= 1
        else:
            self._detail(name, parse_qs(asked.query))

    def _detail(self, name: str, query: dict[str, list[str]]) -> None:
        kind, _, ident = name.removeprefix("live/").partition("/")
        with self.of.lock:
            world = self.of.world
            if kind == "requests":
                found = world.timeline(unquote(ident), int(query.get("choice", ["0"])[0]), time.time())
            else:
                it = world.instances.get(unquote(ident))
                found = it and {"iid": it.iid, "points": [*it.points]}
        self._answer(200 if found else 404, json.dumps(found).encode())

    def _answer(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self._headers(kind, {"Content-Length": str(len(body))})
        self.wfile.write(body)

    def _headers(self, kind: str, more: dict[str, str]) -> None:
        fixed = {"Content-Type": kind, "Content-Security-Policy": POLICY}
        for name, value in (fixed | {"Cache-Control": "no-store"} | more).items():
            self.send_header(name, value)
        self.end_headers()

    def _live(self) -> None:
        self.send_response(200)
        self._headers("text/event-stream", {})
        self.close_connection = True
        with self.of.tick:
            number, told = self.of.number, self.of.message
        with self.of.lock:
            told = self.of.world.first(told | {"now": time.time()})
        while self.of.running and not self.of.broken:
            self.wfile.write(b"data: " + json.dumps(told).encode() + b"\n\n")
            with self.of.tick:
                self.of.tick.wait_for(lambda: self.of.number > number or not self.of.running, timeout=2)  # noqa: B023
                number, told = self.of.number, self.of.message


def past(world: World, now: float, seconds: float, faults: bool) -> None:
    """Let so much time go by before anybody looks."""
    names = [*world.instances]
    for i in range(int(seconds / TICK_S)):
        at = now - seconds + i * TICK_S
        if faults and i == int(seconds / TICK_S * 0.5):
            world.flip(at, names[0], "mixed" if len(names) < 5 else "decode")
        if faults and i == int(seconds / TICK_S * 0.9):
            world.kill(at, names[-1])
            world.notes = [f"{names[-1]} is lost: no heartbeat for 2 s; 3 requests were started again"]
        world.message(at)
    while world.new_moves or world.new_ended:
        world.message(now)


@contextmanager
def serving(
    instances: int = 4, rate: float = 0.0, faults: bool = False, key: str = "", port: int = 0, seconds: float = 0.0
) -> Iterator[Feed]:
    """A feed that runs. `seconds`: how long its deployment has run."""
    world = World(instances, rate)
    past(world, time.time(), seconds, faults)
    feed = Feed(world, key, port)
    feed.start()
    try:
        yield feed
    finally:
        feed.close()


def main() -> None:
    """The feed as a program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--instances", type=int, default=4)
    parser.add_argument("--rate", type=float, default=4.0, help="requests per second")
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--key", default="")
    parser.add_argument("--port", type=int, default=0)
    asked = parser.parse_args()
    with serving(asked.instances, asked.rate, asked.faults, asked.key, asked.port, seconds=400) as feed:
        print(feed.url, flush=True)
        with suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)


if __name__ == "__main__":
    main()
