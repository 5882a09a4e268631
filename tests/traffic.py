"""Requests on a live emulated cluster that keep coming while a test does something to it; every answer is checked."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from live import LiveCluster, wait_until

from tetri.client import AsyncClient, Result, TetriError
from tetri.engine.emulated import reference
from tetri.proc.recorder import read, value
from tetri.request import Sampling


def flip_seconds(cluster: LiveCluster) -> list[float]:
    """Of every flip in the cluster's records: from the moment at which the worker read the Flip, between two engine
    steps, to that at which the broker heard its Heartbeat. All clocks are this machine's."""
    read_at: list[tuple[float, str, str]] = []
    heard_at: list[tuple[float, str, str]] = []
    for path in (cluster.folder / "record").glob("*.events"):
        iid = path.name.split("-")[0]
        for call in read(path)[1]:
            kind = call.event[0][0] if call.event else ""
            if kind == "Flip":
                read_at.append((call.now, iid, value(call.event[0]).role))
            elif kind == "Heartbeat" and iid == "broker":
                heartbeat = value(call.event[0])
                heard_at.append((call.now, heartbeat.iid, heartbeat.role))
    took: list[float] = []
    last: dict[str, str] = {}
    for start, iid, role in sorted(read_at):
        if last.get(iid) != role:  # or it was only said again
            took.append(min(now for now, who, said in heard_at if (who, said) == (iid, role) and now >= start) - start)
        last[iid] = role
    return took


class Pressure:
    """`width` requests are open at any time, until the disturbance has ended. `prompt` and `output`: the most tokens,
    of which between half and all are drawn. The output's length is fixed, so it can be predicted."""

    def __init__(self, cluster: LiveCluster, width: int = 12, prompt: int = 600, output: int = 60) -> None:
        self.cluster, self.width = cluster, width
        self.prompt, self.output = prompt, output
        self.rng = random.Random(width)
        self.asked: list[tuple[list[int], int]] = []
        self.answers: dict[int, Result | TetriError] = {}
        self.ended = False

    def drawn(self) -> tuple[list[int], int]:
        tokens = self.rng.randint(self.prompt // 2, self.prompt)
        output = self.rng.randint(-(-self.output // 2), self.output)
        return [self.rng.randrange(1, 32000) for _ in range(tokens)], output

    async def one_after_another(self, client: AsyncClient) -> None:
        while not self.ended:
            await self.one(client)

    async def one(self, client: AsyncClient) -> None:
        index, (prompt, length) = len(self.asked), self.drawn()
        self.asked.append((prompt, length))
        try:
            self.answers[index] = await client.generate(prompt, max_tokens=length, ignore_eos=True)
        except TetriError as error:
            self.answers[index] = error

    async def _run(self, disturb: Callable[[], None]) -> None:
        async with AsyncClient(self.cluster.config.clients_address, timeout=30) as client:
            tasks = [asyncio.create_task(self.one_after_another(client)) for _ in range(self.width)]
            try:
                await asyncio.to_thread(disturb)
            finally:
                self.ended = True
                await asyncio.gather(*tasks)

    def run(self, disturb: Callable[[], None]) -> list[Result]:
        """All answers, every one of which has the right tokens; then nothing is left in the cluster."""
        asyncio.run(self._run(disturb))
        made = self.cluster.config.emulated
        for index, (prompt, length) in enumerate(self.asked):
            answer = self.answers[index]
            assert isinstance(answer, Result), f"request {index}: {answer!r}"
            right = reference(prompt, Sampling(max_tokens=length, ignore_eos=True), made.vocabulary, made.token_bytes)
            assert answer.token_ids == right, f"request {index}: {answer.receipt}"
        self.cluster.wait_idle()
        return [answer for answer in self.answers.values() if isinstance(answer, Result)]

    def more(self, count: int) -> None:
        """Wait until so many more requests are answered."""
        wanted = len(self.answers) + count
        wait_until(lambda: len(self.answers) >= wanted, f"{count} more answers")
