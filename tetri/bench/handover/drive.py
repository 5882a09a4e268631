"""Run the recorded live cluster and send the requests whose hand-overs are measured."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tetri.bench.deployment import check_straight, running
from tetri.bench.report import BenchError, Progress
from tetri.client import AsyncClient, Result
from tetri.config import Config

GIVE_UP_S = 300.0
OUTPUT = 4  # output tokens of a measured request
PAUSE_S = 0.2  # longest random pause before each: several steps, so that prefills end at any point of a step
TOGETHER = 4  # most rounds with the same running batch
BATCH_PROMPT, BATCH_OUTPUT = 64, 2000  # tokens of each request of that batch
POLL_S = 0.05
VOCABULARY = 256, 4096  # range of token ids that are valid and not special in every model here

Group = tuple[str, int]  # idle or busy, and the prompts' tokens


@dataclass(frozen=True, slots=True)
class Load:
    """`rounds` of one prompt of each length, and as many while a batch of `batch` requests decodes."""

    lengths: Sequence[int]
    rounds: int
    batch: int


@dataclass(frozen=True, slots=True)
class Cluster:
    """The running cluster; `prefill` and `decode` are the names of its two workers."""

    config: Config
    prefill: str
    decode: str

    def record(self, iid: str) -> Path:
        """Return the worker's event record. Raises BenchError if the worker was restarted."""
        found = sorted((self.config.run_dir / "record").glob(f"{iid}-*.events"))
        if len(found) != 1:
            raise BenchError(f"worker {iid} has {len(found)} records instead of 1: it was restarted")
        return found[0]


@contextmanager
def cluster(config: Config, progress: Progress) -> Iterator[Cluster]:
    """Start the cluster and stop it at the end. Raises LaunchError and BenchError."""
    roles = sorted(worker.role for worker in config.workers)
    if roles != ["decode", "prefill"]:
        raise BenchError(f"the configuration must have one prefill and one decode worker, it has {', '.join(roles)}")
    by_role = {worker.role: worker.iid for worker in config.workers}
    with running(config, progress, GIVE_UP_S):
        yield Cluster(config, by_role["prefill"], by_role["decode"])


def run(cluster: Cluster, load: Load, progress: Progress) -> dict[Group, list[str]]:
    """Send all requests and return their ids by group. Raises BenchError."""
    return asyncio.run(_Run(cluster, load, progress).all())


class _Run:
    def __init__(self, cluster: Cluster, load: Load, progress: Progress) -> None:
        self._cluster, self._load, self._progress = cluster, load, progress
        self._rng = Random(4)
        self._rids: dict[Group, list[str]] = {}

    async def all(self) -> dict[Group, list[str]]:
        load, rounds = self._load, self._load.rounds
        async with AsyncClient(self._cluster.config.clients_address, timeout=GIVE_UP_S) as client:
            self._client = client
            for length in load.lengths:
                await self._one("warm", length)
            for number in range(1, rounds + 1):
                await self._round("idle", number)
            await self._busy_rounds()
        self._rids = {group: rids for group, rids in self._rids.items() if group[0] != "warm"}
        return self._rids

    async def _busy_rounds(self) -> None:
        """Run the rounds beside a batch. If the batch ends too early, as prefill is slow, repeat them with fewer rounds
        beside one batch. Raises BenchError if it does not last for one."""
        first, together = 1, TOGETHER
        while first <= self._load.rounds:
            numbers = range(first, min(first + together, self._load.rounds + 1))
            before = {group: list(rids) for group, rids in self._rids.items()}
            async with self._batch() as tasks:
                for number in numbers:
                    await self._round("busy", number)
                lasted = not any(task.done() for task in tasks)
            if lasted:
                first = numbers.stop
            elif len(numbers) == 1:
                raise BenchError("a request of the batch ended before the last hand-over beside it")
            else:
                self._rids, together = before, len(numbers) // 2
                self._progress(f"the batch ended before the last hand-over: trying again, {together} rounds at a time")

    async def _round(self, state: str, number: int) -> None:
        for length in self._load.lengths:
            await asyncio.sleep(self._rng.uniform(0.0, PAUSE_S))
            await self._one(state, length)
        self._progress(f"decode worker {state}: round {number} of {self._load.rounds}")

    async def _one(self, state: str, length: int) -> None:
        result = await self._client.generate(self._prompt(length), max_tokens=OUTPUT, ignore_eos=True)
        check_straight(result.receipt)
        self._rids.setdefault((state, length), []).append(result.rid)

    def _prompt(self, length: int) -> list[int]:
        return [self._rng.randrange(*VOCABULARY) for _ in range(length)]

    @asynccontextmanager
    async def _batch(self) -> AsyncIterator[list[asyncio.Task[Result]]]:
        """Let a batch of requests decode in this context. Yields them."""
        prompts = [self._prompt(BATCH_PROMPT) for _ in range(self._load.batch)]
        calls = [self._client.generate(each, max_tokens=BATCH_OUTPUT, ignore_eos=True) for each in prompts]
        tasks = [asyncio.create_task(call) for call in calls]
        try:
            await self._running(len(tasks))
            yield tasks
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await self._running(0)

    async def _running(self, count: int) -> None:
        """Wait until this many requests decode. Raises BenchError after a timeout."""
        end = time.monotonic() + GIVE_UP_S
        while time.monotonic() < end:
            status = await self._client.status()
            loads = {each["iid"]: each["load"] for each in status["instances"]}
            if self._cluster.decode in loads and loads[self._cluster.decode]["running"] == count:
                return
            await asyncio.sleep(POLL_S)
        raise BenchError(f"after {GIVE_UP_S:.0f} s {self._cluster.decode} does not decode {count} requests")
