"""A worker that reads its messages seldom: what the broker sends it again, and how soon a Cancel gets through."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

from tetri.bench.deployment import polled
from tetri.bench.report import BenchError
from tetri.bench.torture.case import Findings
from tetri.bench.torture.deployed import Deployed, deployed, workers
from tetri.bench.torture.records import calls, sent
from tetri.client import AsyncClient
from tetri.proc.recorder import value
from tetri.wire.messages import Assign, Close

REQUESTS, PROMPT, STEP_S = 4000, 16, 0.5
CANCELLED, CANCEL_S = 20, 3.0  # of the requests that come last; so many seconds after the first
MOST_ASSIGNS, MOST_STEPS = 1.1, 2  # of a request; of a worker until it has read that a request is cancelled
WAIT_S = 120.0
LARGE = (
    *("engine.chunk_tokens=4096", "engine.max_batch=1024", "emulated.blocks=16384", "transfer.slab_blocks=1024"),
    "cluster.record=true",
)


def assigns(folder: Path, found: Findings) -> None:
    """4,000 requests at once for one prefill worker, whose steps last half a second. Some of those that wait longest
    are cancelled."""
    with deployed(folder, found, [workers(1, 1), *LARGE], prefill_s=STEP_S, decode_s=STEP_S) as cluster:
        ended = asyncio.run(_ask(cluster))
        polled(lambda: cluster.instance("p0")["held"], lambda held: not held, WAIT_S, 0.1)
    found.exactly("answers", ended["length"], REQUESTS - CANCELLED)
    found.exactly("cancelled", ended["cancelled"], CANCELLED)
    messages = [*sent(folder, "broker", "p0")]
    count = sum(isinstance(message, Assign) for _, message in messages)
    found.at_most("assigns_of_a_request", round(count / REQUESTS, 3), MOST_ASSIGNS)
    closed: dict[str, float] = {}
    for now, message in messages:
        if isinstance(message, Close) and message.reason == "cancelled":
            closed.setdefault(message.rid, now)
    steps = _steps(folder, closed)
    found.note("cancelled_at_the_worker", len(steps))
    found.at_most("steps_until_cancelled", max(steps, default=0), MOST_STEPS)


async def _ask(cluster: Deployed) -> Counter[str]:
    """Send all requests and cancel some. Returns how many ended for which reason."""
    async with AsyncClient(cluster.config.clients_address, timeout=WAIT_S) as client:
        streams = [client.stream([1000 + number] * PROMPT, max_tokens=1) for number in range(REQUESTS)]
        waiting = asyncio.gather(*(stream.wait() for stream in streams[:-CANCELLED]))
        await asyncio.sleep(CANCEL_S)
        cancelled = [await stream.cancel() for stream in streams[-CANCELLED:]]
        results = await asyncio.wait_for(waiting, WAIT_S)
        return Counter(result.finish_reason for result in (*cancelled, *results))


def _steps(folder: Path, closed: dict[str, float]) -> list[int]:
    """How many steps p0 ended from when each Close was sent until it had read it. `closed`: these times, by request.
    A request that it never got needs no Close. Raises BenchError if it keeps one that was closed."""
    ended, known, found = list[float](), set[str](), list[int]()
    for call in calls(folder, "p0"):
        kind = call.event[0][0] if call.event else ""
        if kind == "StepDone":
            ended.append(call.now)
        elif kind == "Assign":
            known.add(value(call.event[0]).rid)
        elif kind == "Close" and (since := closed.pop(value(call.event[0]).rid, None)) is not None:
            found.append(sum(at > since for at in ended))
    if known.intersection(closed):
        raise BenchError(f"p0 has not read that {len(known.intersection(closed))} requests are cancelled")
    return found
