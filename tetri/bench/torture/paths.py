"""Instances that cannot read KV, while all their messages arrive."""

from __future__ import annotations

import asyncio
import resource
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from tetri.bench.deployment import polled, segments
from tetri.bench.torture.case import Findings
from tetri.bench.torture.deployed import Deployed, deployed, workers
from tetri.bench.torture.load import Load
from tetri.bench.torture.records import sent
from tetri.client import AsyncClient, RequestFailed, Result
from tetri.wire.handover import Offer

REQUESTS, WIDTH = 480, 16
MOST_ATTEMPTS = 2
HEAL_S, WAIT_S = 30.0, 10.0
IIDS = ("p0", "p1", "d0", "d1")
PATIENCE_S, ENDS_S, BACK_S = 4.0, 3.0, 2.0  # of the cut path: until an error, how much later, until it heals
MOST_OFFERS = 12


@contextmanager
def blind(cluster: Deployed, iid: str) -> Iterator[None]:
    """Let an instance open no more files in this context. One that has read no KV so far cannot read any."""
    pid = cluster.pid(iid)
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    numbers = {int(path.name) for path in Path(f"/proc/{pid}/fd").iterdir()}
    lowest = next(number for number in count() if number not in numbers)  # the next file would get this number
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (lowest, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def unreadable(folder: Path, found: Findings) -> None:
    """One of two decode instances has no descriptor left when it first wants to read KV, so it always looks empty. No
    request may end in an error while the other one is healthy."""
    with deployed(folder, found, [workers(1, 2)], prefill_s=0.002, decode_s=0.005) as cluster:
        with blind(cluster, "d1"), Load(cluster.config, WIDTH, REQUESTS) as load:
            load.wait(REQUESTS // 2)
            found.at_least("status_names_it", _named(cluster, "d1"), 1)
            load.wait(REQUESTS)
        load.judge(found)
        found.at_most("most_attempts", load.most_attempts(), MOST_ATTEMPTS)
        found.note("decoded_on", load.places())
        start = time.monotonic()
        with Load(cluster.config, WIDTH) as later:
            polled(later.places, lambda places: places.get("d1", 0) > 0, 2 * HEAL_S, 0.05)
            found.at_most("used_again_after_s", round(time.monotonic() - start, 1), HEAL_S)
        found.exactly("errors_later", dict(later.errors), {})


def unlinked(folder: Path, found: Findings) -> None:
    """Somebody removes the files of all segments while requests run, as a session manager does at logout. No request
    needs another attempt, and the status names each segment."""
    with deployed(folder, found, [workers(2, 2)]) as cluster, Load(cluster.config, WIDTH // 2) as load:
        load.wait(WIDTH)
        names = segments(cluster.config)
        for name in names:
            Path("/dev/shm", name).unlink()
        load.wait(4 * WIDTH)
        wanted = len(IIDS)
        named = polled(lambda: _all_named(cluster), lambda count: count == wanted, WAIT_S, 0.1)
        load.finish()
        load.judge(found)
        found.exactly("segments_removed", len(names), wanted)
        found.exactly("status_names", named, wanted)
        found.at_most("most_attempts", load.most_attempts(), 1)


def _named(cluster: Deployed, iid: str) -> int:
    """The notes and remarks of a status that name this instance."""
    status = cluster.status()
    remarks = [f"{each['iid']}: {each['note']}" for each in status["instances"] if each["note"]]
    return sum(iid in line for line in (*status["notes"], *remarks))


def _all_named(cluster: Deployed) -> int:
    return sum(_named(cluster, iid) > 0 for iid in IIDS)


def cut_path(folder: Path, found: Findings) -> None:
    """The only decode instance cannot read the KV of the only prefill instance. A request ends after `patience_s` with
    the reason; one that still waits when the path heals is answered."""
    settings = [workers(1, 1), f"cluster.patience_s={PATIENCE_S}", "cluster.record=true"]
    with deployed(folder, found, settings) as cluster:
        asyncio.run(_cut(cluster, found))
    offers = Counter(message.rid for _, message in sent(folder, "p0") if isinstance(message, Offer))
    found.at_most("offers_of_a_request", max(offers.values(), default=0), MOST_OFFERS)


async def _cut(cluster: Deployed, found: Findings) -> None:
    async with AsyncClient(cluster.config.clients_address) as client:
        with blind(cluster, "d0"):
            start = time.monotonic()
            first = await _ended(client)
            found.at_most("ended_after_s", round(time.monotonic() - start, 1), PATIENCE_S + ENDS_S)
            found.at_least("errors_with_the_reason", int(isinstance(first, str) and "KV" in first), 1)
            found.note("reason", first if isinstance(first, str) else first.finish_reason)
            waits = asyncio.create_task(_ended(client))
            await asyncio.sleep(BACK_S)
        second = await waits
        found.exactly("ended_when_healed", second if isinstance(second, str) else second.finish_reason, "length")


async def _ended(client: AsyncClient) -> Result | str:
    """A request's result, or the error with which it ended."""
    try:
        return await asyncio.wait_for(client.generate([7] * 100, max_tokens=40, ignore_eos=True), 5 * PATIENCE_S)
    except RequestFailed as error:
        return str(error)
    except TimeoutError:
        return "no end"
