"""bench_clients: what many open streams of one client cost it, and the broker if that client stops reading.

`client`: processor time of one Delta in the thread of the client, with --streams open requests: the blocking client,
and the asyncio client whose tasks wait for their whole answer, or iterate over its pieces or its events.

`broker`: the broker's loop and sockets, with tokens for all streams of one client and for one stream of another every
--step-ms. The first client reads, stops, and reads again. `gap_ms`: between two Deltas of the other client's stream.
`probe_ms`: the ticks in which the broker tried the stopped client again; `tried`: most messages in such a tick;
`probing_percent`: the share of the loop's time that they took. `unsent`: messages that wait at the broker in the end.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, cast

import click
import zmq

from tetri.bench.report import BenchError, Program, Progress, as_json, give, progress, spread, table
from tetri.client import AsyncClient, AsyncStream, Client
from tetri.client.facade import new_secret
from tetri.core.actions import Reply
from tetri.core.broker.broker import Broker
from tetri.core.broker.delivery import Limits
from tetri.cost import Cost
from tetri.engine.emulated import EmulatedEngine
from tetri.instance import Capacity, Instance, Reach
from tetri.net.hub import Hub
from tetri.policy.rules import Rules
from tetri.proc.broker import ActionExecutor
from tetri.proc.texts import Texts
from tetri.request import Receipt, Sampling, Stage, Usage
from tetri.text import ByteTokenizer
from tetri.wire.clients import Accepted, BrokerReply, ClientMessage, Delta, Done, Submit
from tetri.wire.codec import decode, encode
from tetri.wire.events import PeerUp
from tetri.wire.load import Load
from tetri.wire.messages import Ready, Staged, TokenItem, Tokens

KINDS = ("blocking", "asyncio, whole answers", "asyncio, pieces", "asyncio, events")
LIMIT_US, LIMIT_PROBE_MS = 20.0, 1.0
LIMIT_GAP_MS = 200.0  # beyond the time between two tokens
PATIENCE_S = 600.0
SPARE = 64  # requests that may be open besides those of the one client
PHASES = ("reads", "stopped", "reads again")


# ---------------------------------------------------------------- the client


class PlayedBroker:
    """Accepts `streams` requests, whose prompts are their rids; sends each its tokens once `go` is set."""

    def __init__(self, streams: int, tokens: int) -> None:
        self.streams, self.tokens, self.go = streams, tokens, threading.Event()
        self._socket: Any = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.set(zmq.LINGER, 0)
        self._socket.set(zmq.SNDHWM, 0)
        self.address = f"tcp://127.0.0.1:{self._socket.bind_to_random_port('tcp://127.0.0.1')}"
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> PlayedBroker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.go.set()
        self._thread.join(PATIENCE_S)
        self._socket.close()

    def _run(self) -> None:
        client, rids = b"", list[str]()
        while len(rids) < self.streams:
            client, data = self._socket.recv_multipart()
            submitted = decode(data, ClientMessage)
            if isinstance(submitted, Submit):
                rids.append(str(submitted.prompt))
                self._send(client, Accepted(key=submitted.key, rid=rids[-1], prompt_tokens=1, max_tokens=self.tokens))
        self.go.wait()
        for start in range(self.tokens):
            for rid in rids:
                self._send(client, Delta(rid=rid, start=start, ids=[5], text="text "))
        for rid in rids:
            self._send(client, done(rid, self.tokens))

    def _send(self, client: bytes, message: BrokerReply) -> None:
        self._socket.send_multipart((client, encode(message)))


def done(rid: str, tokens: int) -> Done:
    """The end of a request that went well."""
    usage, receipt = Usage(prompt_tokens=1, completion_tokens=tokens), Receipt(prompt_tokens=1)
    return Done(
        rid=rid, reason="length", usage=usage, timeline={}, ttft_s=0.0, jct_s=0.0, receipt=receipt, error=None
    )


def delta_us(kind: str, streams: int, tokens: int) -> float:
    """Microseconds of processor time that one Delta costs a client with so many open streams."""
    with PlayedBroker(streams, tokens) as broker:
        used_s = _blocking(broker) if kind == KINDS[0] else asyncio.run(_asyncio(broker, kind))
    return 1e6 * used_s / (streams * tokens)


def _blocking(broker: PlayedBroker) -> float:
    with Client(broker.address, PATIENCE_S, silence_s=PATIENCE_S) as client:
        open_streams = [client.stream(f"r{number}") for number in range(broker.streams)]
        broker.go.set()
        start = time.thread_time()
        for stream in open_streams:
            stream.wait()
        return time.thread_time() - start


async def _asyncio(broker: PlayedBroker, kind: str) -> float:
    async with AsyncClient(broker.address, PATIENCE_S, silence_s=PATIENCE_S) as client:

        async def answer(rid: str) -> None:
            stream: AsyncStream[Any] = client.events(rid) if kind == KINDS[3] else client.stream(rid)
            if kind != KINDS[1]:
                async for _ in stream:
                    pass
            await stream.wait()

        tasks = [asyncio.create_task(answer(f"r{number}")) for number in range(broker.streams)]
        await asyncio.sleep(0)
        broker.go.set()
        start = time.thread_time()
        await asyncio.gather(*tasks)
        return time.thread_time() - start


# ---------------------------------------------------------------- the broker


class Talker:
    """A client of ZeroMQ alone, which reads only when it is asked to."""

    def __init__(self, context: zmq.Context[Any], address: str) -> None:
        self.socket: Any = context.socket(zmq.DEALER)
        self.socket.set(zmq.LINGER, 0)
        self.socket.set(zmq.RCVHWM, 1000)
        self.socket.connect(address)
        self.received = 0

    def submit(self, key: str, tokens: int) -> None:
        """Ask for so many tokens."""
        sampling = Sampling(max_tokens=tokens, ignore_eos=True)
        self.socket.send(encode(Submit(key=key, secret=new_secret(), prompt=[1], sampling=sampling)))

    def read(self) -> list[BrokerReply]:
        """All that waits."""
        found: list[BrokerReply] = []
        while self.socket.get(zmq.EVENTS) & zmq.POLLIN:
            found.append(cast(BrokerReply, decode(self.socket.recv(), BrokerReply)))
        self.received += len(found)
        return found


class PlayedCluster:
    """A broker's loop, the one worker that it knows, and its two clients: `many` has all streams but one."""

    def __init__(self, hub: Hub, context: zmq.Context[Any], address: str, streams: int, tokens: int) -> None:
        capacity = Capacity(blocks=1 << 20, block_tokens=16, chunk_tokens=1 << 15, max_batch=1 << 14, context=1 << 14)
        engine = EmulatedEngine(capacity=capacity, token_bytes=8, vocabulary=64, cost=Cost())
        limits = Limits(context=capacity.context, vocabulary=64, max_open=streams + SPARE, dead_s=PATIENCE_S)
        self.core = Broker(limits, Rules(), 1, Random(1), time.monotonic())
        logger = logging.getLogger("bench")
        texts = Texts([], hub.wake, 0, logger)  # these prompts are token ids
        self.hub, self.executor = hub, ActionExecutor(self.core, hub, ByteTokenizer(), texts, logger)
        self.streams, self.index = streams, 0
        self.many, self.other = Talker(context, address), Talker(context, address)
        self.reading = True
        self.probes: list[tuple[float, int]] = []  # seconds of a tick that met a full queue, and messages tried
        reach = Reach(paths=["local"], host="", process=0, segment="m0")
        inbox = f"{address}-m0"
        worker = Instance(
            iid="m0", incarnation=1, role="mixed", inbox=inbox, fingerprint=engine.fingerprint,
            capacity=capacity, reach=reach,
        )  # fmt: skip
        for event in (Ready(instance=worker, load=Load(free_blocks=capacity.blocks)), PeerUp("m0")):
            self.handle(event)
        for number in range(streams):
            self.many.submit(f"k{number}", tokens)
        self._until(lambda: self.core.table.open == streams)
        self.other.submit("other", tokens)
        self._until(lambda: self.core.table.open == streams + 1)
        choices = [*self.core.table.active()]
        self.rids, self.name = [choice.id for choice in choices], choices[0].request.client
        for rid in self.rids:
            self.handle(Staged(iid="m0", incarnation=1, rid=rid, attempt=1, stage=Stage.DECODE))

    def _until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE_S
        while not condition():
            self.turn(0.001)
            if time.monotonic() > end:
                raise BenchError("the broker has not accepted the requests")

    def handle(self, event: Any) -> None:
        """Let the core handle an event."""
        self.executor.act(self.core.handle(event, time.monotonic()))

    def turn(self, most_s: float) -> int:
        """One turn of the broker's loop, of at most `most_s`; the number of Deltas that `other` got."""
        deadline = self.core.deadline() or 0.0
        for event in self.executor.poll(max(0.0, min(most_s, deadline - time.monotonic()))):
            self.handle(event)
        before, full = time.perf_counter(), self.hub.counters["replies_full"]
        actions = self.core.tick(time.monotonic())
        self.executor.act(actions)
        if self.hub.counters["replies_full"] > full:
            tried = sum(isinstance(action, Reply) and action.client == self.name for action in actions)
            self.probes.append((time.perf_counter() - before, tried))
        if self.reading:
            self.many.read()
        return sum(isinstance(message, Delta) and message.ids != [] for message in self.other.read())

    def unsent(self) -> int:
        """Tokens that wait in the broker."""
        return sum(row.outbox.unsent for row in self.core.table.active())

    def phase(self, steps: int, step_s: float) -> dict[str, Any]:
        """Let every stream get so many tokens, one every `step_s`; what that was like. A blocked client is tried again
        at least once."""
        begin = last = time.monotonic()
        next_at, gaps, self.probes = begin, list[float](), []
        while steps or time.monotonic() < next_at or (not self.reading and not self.probes and self.unsent()):
            if steps and time.monotonic() >= next_at:
                next_at, steps = next_at + step_s, steps - 1
                items = [TokenItem(rid=rid, attempt=1, start=self.index, ids=[65]) for rid in self.rids]
                self.index += 1
                self.handle(Tokens(iid="m0", incarnation=1, items=items))
            if self.turn(max(0.0, next_at - time.monotonic())):
                gaps.append(time.monotonic() - last)
                last = time.monotonic()
        found: dict[str, Any] = {"gap_ms": spread(gaps, 1000, 1), "unsent": self.unsent(), "probes": len(self.probes)}
        if self.probes:
            found["probe_ms"] = spread([lasted for lasted, _ in self.probes], 1000, 3)
            found["tried"] = max(tried for _, tried in self.probes)
            found["probing_percent"] = round(100 * sum(lasted for lasted, _ in self.probes) / (last - begin), 2)
        return found


@contextmanager
def played(streams: int, tokens: int) -> Iterator[PlayedCluster]:
    """A broker with its clients, which have submitted their requests."""
    hub, context = Hub(), zmq.Context[Any]()
    with tempfile.TemporaryDirectory(prefix="tetri-", dir="/tmp") as folder:
        try:
            address = hub.bind_clients(f"ipc://{Path(folder)}/clients", ClientMessage)
            yield PlayedCluster(hub, context, address, streams, tokens)
        finally:
            hub.close()
            context.destroy(0)


def stopped_reader(streams: int, steps: int, step_s: float) -> dict[str, Any]:
    """The three phases, by name. Raises BenchError if the client that stopped reading does not get all in the end."""
    with played(streams, len(PHASES) * steps + 1) as cluster:
        found = {}
        for name in PHASES:
            cluster.reading = name != "stopped"
            found[name] = cluster.phase(steps, step_s)
        end = time.monotonic() + PATIENCE_S
        while cluster.unsent():
            cluster.turn(0.001)
            if time.monotonic() > end:
                raise BenchError("the client that reads again does not get all")
        return found


# ---------------------------------------------------------------- the program


def measured(streams: int, tokens: int, seconds: float, step_ms: float, note: Progress) -> dict[str, Any]:
    """All figures, and whether they are within their limits."""
    client = {}
    for kind in KINDS:
        note(f"{kind}: {streams} streams of {tokens} tokens")
        client[kind] = round(delta_us(kind, streams, tokens), 2)
    note(f"the broker, three times {seconds:g} s")
    broker = stopped_reader(streams, max(1, round(1000 * seconds / step_ms)), step_ms / 1000)
    probe = broker["stopped"].get("probe_ms", {"median": 0.0})["median"]
    gap = max(broker[name]["gap_ms"]["worst"] for name in PHASES)
    ok = max(client.values()) <= LIMIT_US and probe <= LIMIT_PROBE_MS and gap <= step_ms + LIMIT_GAP_MS
    limits = {"delta_us": LIMIT_US, "probe_ms": LIMIT_PROBE_MS, "gap_ms": step_ms + LIMIT_GAP_MS}
    return {"streams": streams, "delta_us": client, "broker": broker, "limits": limits, "ok": ok}


def shown(found: dict[str, Any]) -> str:
    """The figures as a table."""
    lines = [f"{found['streams']} open streams of one client"]
    lines += [f"a Delta in the client, {kind}: {us:.1f} us" for kind, us in found["delta_us"].items()]
    rows = []
    for name, each in found["broker"].items():
        gap, probe = each["gap_ms"], each.get("probe_ms", {})
        rows.append(
            [name, f"{gap['median']:.1f}", f"{gap['worst']:.1f}", str(each["unsent"]), str(each["probes"]),
             f"{probe['median']:.3f}" if probe else "", f"{probe['worst']:.3f}" if probe else "",
             str(each.get("probing_percent", ""))]
        )  # fmt: skip
    head = ["the client", "gap ms", "worst", "unsent", "probes", "probe ms", "worst", "% of the loop"]
    return "\n".join([*lines, table(head, rows), f"within the limits: {'yes' if found['ok'] else 'no'}"])


@click.command(cls=Program)
@click.option("--streams", type=click.IntRange(1), default=1000, show_default=True, help="Open requests of one client.")
@click.option("--tokens", type=click.IntRange(1), default=30, show_default=True, help="Of each, for the client's cost.")
@click.option("--seconds", type=click.FloatRange(0.1), default=5.0, show_default=True, help="Of each of three phases.")
@click.option("--step-ms", type=click.FloatRange(1.0), default=100.0, show_default=True, help="Between two tokens.")
@as_json
def main(streams: int, tokens: int, seconds: float, step_ms: float, as_json: bool) -> None:
    """Measure what the many open streams of one client cost it, and the broker when it stops reading."""
    found = measured(streams, tokens, seconds, step_ms, progress)
    give(found, shown(found), as_json)


if __name__ == "__main__":
    main(prog_name="bench_clients")
