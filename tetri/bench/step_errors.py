"""step_errors: how far off predicted step times are while a deployment serves: by the cost table alone, and corrected.

    tools/bench_steps --requests 200 --rate 1

Requests of random lengths arrive at random; every worker records its events. Then each record is played to a fresh
core, which predicts each step just before it is told how long the step took.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import click

from tetri.bench.deployment import EXPECTED, LOAD_S, configured, own_folder, running
from tetri.bench.report import Program, as_json, conf, give, one_line, overrides, progress, table
from tetri.client import AsyncClient
from tetri.config import Config, default_path
from tetri.core.worker.worker import Worker
from tetri.cost import CorrectedCost, Cost
from tetri.engine_request import StepDone
from tetri.metrics import percentile
from tetri.proc.recorder import WorkerStart, read, value
from tetri.proc.replay import records
from tetri.wire.handover import Offer
from tetri.wire.messages import Assign

PHASES = ("prefill", "decode", "mixed")
SECTIONS = (
    0,
    20,
    100,
)  # requests that a worker has seen: the steps after so many, up to the next number, count together
VOCABULARY = 32000  # token ids that both the default model and an emulated engine have


@dataclass(frozen=True, slots=True)
class PredictedStep:
    """One engine step. `requests`: how many the worker had seen; `seconds`: measured; `table_s`, `corrected_s`:
    predicted by its cost table, and by the corrected one."""

    phase: str
    requests: int
    seconds: float
    table_s: float
    corrected_s: float


def steps(path: Path) -> Iterator[PredictedStep]:
    """The steps in the record of a worker, with what its core predicted; none for another record. Raises
    RecordError."""
    start, calls = read(path)
    if not isinstance(start, WorkerStart):
        return
    core, requests, begin = start.core(), set[str](), 0.0
    for call in calls:
        if call.verb == "tick":
            core.tick(call.now)
        else:
            event = value(call.event[0])
            if isinstance(event, Assign | Offer):
                requests.add(event.rid)
            elif isinstance(event, StepDone) and (event.spans or event.tokens):
                yield _predicted(core, event, len(requests), call.now - begin)
            core.handle(event, call.now)
        if any(name == "Step" for name, _ in call.actions):
            begin = call.now


def _predicted(core: Worker, done: StepDone, requests: int, seconds: float) -> PredictedStep:
    """A step, of which the core does not know yet that it is done."""
    running = core.decode.batch.running
    sizes = [running[sampled.key].size for sampled in done.tokens if sampled.key in running]
    batch, context = len(sizes), sum(sizes)

    def predicted(cost: Cost | CorrectedCost) -> float:
        return cost.step_s(done.spans, batch, context) if done.spans else cost.decode_run_s(batch, context, done.steps)

    phase = ("mixed" if batch else "prefill") if done.spans else "decode"
    return PredictedStep(phase, requests, seconds, predicted(core.cost.table), predicted(core.cost))


def summary(found: Sequence[PredictedStep]) -> dict[str, Any]:
    """Errors over some steps, relative to the measured seconds: `mean` and `p95` of their sizes, and `sum`, that of the
    time of all steps together; each by the table and corrected."""
    made: dict[str, Any] = {"steps": len(found)}
    total = sum(step.seconds for step in found)
    for name in ("table_s", "corrected_s"):
        errors = [abs(getattr(step, name) / step.seconds - 1) for step in found]
        summed = sum(getattr(step, name) for step in found) / total - 1
        made[name.removesuffix("_s")] = {"mean": fmean(errors), "p95": percentile(errors, 0.95), "sum": summed}
    return made


def sections(found: Sequence[PredictedStep]) -> dict[str, Any]:
    """`summary` by the number of requests that the worker had seen, and phase."""
    made: dict[str, Any] = {}
    for least, most in zip(SECTIONS, (*SECTIONS[1:], 1 << 62), strict=True):
        for phase in PHASES:
            part = [step for step in found if least < step.requests <= most and step.phase == phase]
            if part:
                made[f"{phase}, after {least} requests"] = summary(part)
    return made


async def _served(config: Config, count: int, rate: float, seed: int) -> None:
    rng = Random(seed)
    async with AsyncClient(config.clients_address, timeout=LOAD_S) as client, asyncio.TaskGroup() as group:
        for _ in range(count):
            prompt = [rng.randrange(1, VOCABULARY) for _ in range(round(rng.lognormvariate(5.3, 0.8)) + 1)]
            most = rng.randint(5, 60)
            group.create_task(client.generate(prompt[:1500], max_tokens=most, ignore_eos=True))
            await asyncio.sleep(rng.expovariate(rate))


@click.command(cls=Program)
@conf
@click.option("--requests", type=click.IntRange(1), default=200, show_default=True)
@click.option("--rate", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True, help="A second.")
@click.option("--seed", default=0, show_default=True)
@overrides
@as_json
def main(conf: Path | None, requests: int, rate: float, seed: int, overrides: tuple[str, ...], as_json: bool) -> None:
    """Serve requests, and compare each engine step with its predicted time."""
    with one_line("bench_steps", *EXPECTED, status=2), own_folder("steps") as folder:
        config = configured(conf or default_path(), folder, "steps", [*overrides, "cluster.record=true"])
        with running(config, progress, LOAD_S):
            asyncio.run(_served(config, requests, rate, seed))
        found = [step for path in records(folder) for step in steps(path)]
    made = sections(found)
    give({"requests": requests, "rate": rate, "errors": made}, shown(made), as_json)


def shown(made: dict[str, dict[str, Any]]) -> str:
    """Format the result as a table."""
    rows = [
        [name, f"{each['steps']}", *(f"{part[key]:.1%}" for part in (each["table"], each["corrected"]) for key in part)]
        for name, each in made.items()
    ]
    head = ("errors", "steps", "table: mean", "p95", "sum", "corrected: mean", "p95", "sum")
    return table(head, rows)


if __name__ == "__main__":
    main(prog_name="bench_steps")
