"""migrate: running decodes that go on at another instance: whether their tokens are the same, and how long they stand
still.

    tools/bench_migrate --requests 200                     # emulated engines
    tools/bench_migrate --requests 20 --batch 10 --engine vllm
    tools/bench_migrate --kill destination                 # a worker dies in the middle

Each round lets a batch decode at one instance, and flips that to prefill, so that all of its decodes go on at the other
one. The reference is the same batch where it stays, in the same deployment. A gap is the time from the last step at the
source to the end of the first step at the destination; allowed are a step there, two here, the copy of a chunk and
20 ms. Exit status 1 when an answer differs, or without a kill when a request was computed twice, stood still for too
long, or did not move.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import click
import msgspec

from tetri.bench.deployment import EXPECTED, LOAD_S, REPOSITORY, configured, own_folder, running
from tetri.bench.report import (
    BenchError,
    Program,
    Progress,
    as_json,
    give,
    one_line,
    overrides,
    progress,
    spread,
    table,
)
from tetri.client import AsyncClient, Operator, Result
from tetri.config import Config
from tetri.proc.supervise import Supervisor
from tetri.wire.observation import Timeline

SLACK_S = 0.02
FIRST, OTHER = "d0", "d1"
PROMPTS = 100, 600  # tokens
IDS = 256, 4096  # ids that are valid and not special in every model here
AHEAD_S = 0.5  # that the batch decodes before it moves
POLL_S = 0.02

CONF = """
[engine]
kind = "{engine}"

[model]
dtype = "float32"

[policy]
migrate = "everywhere"

[transfer]
slab_blocks = {slab}

[[worker]]
iid = "p0"
role = "prefill"
cpus = "+0"

[[worker]]
iid = "d0"
role = "decode"
cpus = "+0"

[[worker]]
iid = "d1"
role = "decode"
cpus = "+1"
"""
EMULATED = f'cost = "{REPOSITORY}/conf/cost/cpu-smollm2.toml"\nblock_tokens = 16\nmax_batch = 64'
VLLM = "max_batch = 32\nkv_mib = 1536"


def conf(engine: str) -> str:
    """Return the configuration of a prefill and two decode workers."""
    more, slab = (EMULATED, 256) if engine == "emulated" else (VLLM, 32)
    return CONF.format(engine=engine, slab=slab).replace("[model]", f"{more}\n\n[model]", 1)


def prompts(count: int, seed: int) -> list[list[int]]:
    """Return `count` prompts of different lengths."""
    rng = Random(seed)
    return [[rng.randrange(*IDS) for _ in range(rng.randrange(*PROMPTS))] for _ in range(count)]


def gap(timeline: Timeline) -> tuple[float, float] | None:
    """Return how many seconds a request stood still when it went on elsewhere, and how many are allowed. None: it did
    not, or its steps are not known."""
    steps = timeline.steps
    places = [place for place in range(1, len(steps)) if steps[place].iid != steps[place - 1].iid]
    place = next((place for place in places if place > 1), None)  # the first token is of the prefill instance
    if place is None:
        return None
    source, here = steps[place - 1], steps[place]
    copies = [event for event in timeline.events if event.kind == "fetch" and event.iid == here.iid]
    copy_s = max(copies, key=lambda event: event.at).seconds if copies else 0.0
    stood_s = here.start_s + here.seconds - source.start_s - source.seconds
    return stood_s, source.seconds + 2 * here.seconds + copy_s + SLACK_S


class Run:
    """The rounds, in a running deployment. `tokens`: output of each request. `kill`: which side dies in each round, ""
    for none."""

    def __init__(self, config: Config, tokens: int, kill: str, progress: Progress) -> None:
        self.config, self.tokens, self.kill, self.progress = config, tokens, kill, progress
        self.source, self.destination = FIRST, OTHER

    async def all(self, texts: Sequence[list[int]], batch: int) -> list[tuple[Result, Result, Timeline]]:
        """Return for each prompt its answer by itself, the one that moved, and the timeline of that. Raises
        BenchError and TetriError."""
        found: list[tuple[Result, Result, Timeline]] = []
        with Operator(f"ipc://{self.config.run_dir}/operators") as self.operator:
            async with AsyncClient(self.config.clients_address, timeout=LOAD_S) as self.client:
                for first in range(0, len(texts), batch):
                    part = texts[first : first + batch]
                    found += await self._round(part)
                    self.progress(f"{len(found)} of {len(texts)} requests")
        return found

    async def _round(self, texts: Sequence[list[int]]) -> list[tuple[Result, Result, Timeline]]:
        await self._flip(self.destination, "prefill")
        right = await self._answers(texts)
        moved = asyncio.create_task(self._answers(texts))
        await self._decode(len(texts))
        await asyncio.sleep(AHEAD_S)
        await self._flip(self.destination, "decode")
        await self._flip(self.source, "prefill")
        if self.kill:
            await asyncio.sleep(AHEAD_S / 2)
            os.kill(self._pid(self.source if self.kill == "source" else self.destination), signal.SIGKILL)
        answers = await moved
        timelines = [msgspec.convert(await self.client.explain(each.rid), Timeline) for each in answers]
        await self._settled()
        self.source, self.destination = self.destination, self.source
        if self.kill:
            await self._flip(self.source, "decode")
        return list(zip(right, answers, timelines, strict=True))

    async def _flip(self, iid: str, role: str) -> None:
        await asyncio.to_thread(self.operator.flip, iid, role)

    async def _answers(self, texts: Sequence[list[int]]) -> list[Result]:
        asked = [self.client.generate(text, max_tokens=self.tokens, ignore_eos=True) for text in texts]
        return await asyncio.gather(*asked)

    async def _decode(self, count: int) -> None:
        """Wait until so many requests decode."""
        for _ in range(int(LOAD_S / POLL_S)):
            if (await self.client.status())["requests"].get("decode", 0) >= count:
                return
            await asyncio.sleep(POLL_S)
        raise BenchError(f"{count} requests do not decode together: the batch is too large")

    async def _settled(self) -> None:
        """Wait until all workers are there."""
        for _ in range(int(LOAD_S / POLL_S)):
            if all(each["state"] == "ready" for each in (await self.client.status())["instances"]):
                return
            await asyncio.sleep(POLL_S)
        raise BenchError("a worker that was killed has not come back")

    def _pid(self, iid: str) -> int:
        return next(program.pid for program in Supervisor(self.config.run_dir).programs() or () if program.name == iid)


def judged(found: Sequence[tuple[Result, Result, Timeline]], kill: str) -> dict[str, Any]:
    """Return what came of all requests."""
    differ = sum(right.token_ids != moved.token_ids for right, moved, _ in found)
    receipts = [moved.receipt for _, moved, _ in found]
    again = sum(receipt.attempts > 1 or bool(receipt.recomputed) for receipt in receipts)
    gaps = [each for each in (gap(timeline) for _, _, timeline in found) if each is not None]
    late = [stood_s - limit_s for stood_s, limit_s in gaps if stood_s > limit_s]
    made = {
        "requests": len(found),
        "differ": differ,
        "moved": sum(bool(receipt.migrated) for receipt in receipts),
        "computed_again": again,
        "late": len(late),
        "late_ms": {"worst": round(1e3 * max(late, default=0.0), 1)},
        "gap_ms": spread([stood_s for stood_s, _ in gaps], 1e3, 1) if gaps else {},
        "limit_ms": spread([limit_s for _, limit_s in gaps], 1e3, 1) if gaps else {},
    }
    made["ok"] = not differ and (bool(kill) or not (late or again) and made["moved"] == len(found))
    return made


@click.command(cls=Program)
@click.option("--engine", type=click.Choice(["emulated", "vllm"]), default="emulated", show_default=True)
@click.option("--requests", "count", type=click.IntRange(1), default=200, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=25, show_default=True, help="Requests of a round.")
@click.option("--tokens", type=click.IntRange(40), default=200, show_default=True, help="Output tokens of each.")
@click.option("--kill", type=click.Choice(["", "source", "destination"]), default="", help="Who dies in each round.")
@overrides
@as_json
def main(
    engine: str, count: int, batch: int, tokens: int, kill: str, overrides: tuple[str, ...], as_json: bool
) -> None:  # fmt: skip
    """Move running decodes, and compare their tokens and the time for which they stood still."""
    with one_line("bench_migrate", *EXPECTED, status=2), own_folder("migrate") as folder:
        path = Path(folder, "bench.toml")
        path.write_text(conf(engine), encoding="utf-8")
        config = configured(path, folder, "migrate", overrides)
        with running(config, progress, LOAD_S):
            found = asyncio.run(Run(config, tokens, kill, progress).all(prompts(count, 5), batch))
    made = judged(found, kill)
    give({"engine": engine, "kill": kill, **made}, shown(made), as_json)
    sys.exit(0 if made["ok"] else 1)


def shown(made: dict[str, Any]) -> str:
    """Format the result as a table."""
    return table(("", ""), [[name, str(value)] for name, value in made.items()])


if __name__ == "__main__":
    main(prog_name="bench_migrate")
