"""parity: check that the simulator is accurate: serve the same requests live on emulated engines and in the simulator.

Compares TTFT and JCT of every request as the broker measures them. The simulator gets the actual send times of the live
requests, so that only the serving is compared.

    tools/parity --runs 3 --requests 1000
    tools/parity --runs 1 --requests 600 --case Mixed/v100-opt13b/2/balanced --load 0.6     # adaptive instances

Exit status 1 when a mean or the attainment differs by more than 5 %, or a 99th percentile by more than 10 %.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import click

from tetri import cost
from tetri.bench import simulated
from tetri.bench.deployment import EMULATED, EXPECTED, START_S, configured, own_folder, running
from tetri.bench.report import Program, Progress, as_json, give, one_line, overrides, progress, table
from tetri.client import AsyncClient
from tetri.config import Config
from tetri.cost import Cost
from tetri.metrics import summarise
from tetri.proc import build
from tetri.sim.setup import Setup
from tetri.sim.sweep import cases
from tetri.sim.sweep.cases import Case
from tetri.sim.traces import Arrival, TokenCounts, drawn
from tetri.sim.world import World

LIMITS = {"mean": 0.05, "p99": 0.10, "attainment": 0.05}  # the largest relative error of the simulator
LEAD_S = 0.5  # seconds before the first request
CONTEXT, BLOCK = 4096, 16  # tokens
EXAMPLE = "shift/v100-opt13b/2/balanced"

Times = Sequence[tuple[float, float, bool]]  # TTFT and JCT of each request, seconds, and whether it kept its limits


def deployment(folder: Path, overrides: Sequence[str] = (), case: Case | None = None) -> Config:
    """Return the configuration: emulated engines with steps of 27 ms and more. With a case, its cost table, its limits,
    and so many adaptive instances. Raises ConfigError."""
    steps = ["engine.cost=v100-opt13b.toml", f"emulated.context={CONTEXT}"]
    if case is None:
        return configured(EMULATED, folder, "parity", [*steps, *overrides])
    slo, table = case.slo(), cost.load(case.cost)
    steps = [f"engine.cost={cost.TABLES / case.cost}.toml", f"emulated.context={CONTEXT}"]
    steps += [f"slo.ttft_s={slo.ttft_s}", f"slo.tpot_s={slo.tpot_s}"]
    steps += [f"engine.block_tokens={BLOCK}", f"emulated.blocks={table.kv_tokens // BLOCK}"]
    steps.append(f"engine.chunk_tokens={table.chunk_tokens}")
    return configured(_adaptive(folder, case.instances), folder, "parity", [*steps, *overrides])


def _adaptive(folder: Path, instances: int) -> Path:
    """Write a configuration with so many adaptive instances of the emulated engine."""
    workers = (f'[[worker]]\niid = "a{number}"\nrole = "auto"\n' for number in range(instances))
    path = folder / "auto.toml"
    path.write_text("\n".join(['[engine]\nkind = "emulated"\n', *workers]), encoding="utf-8")
    return path


def setup_of(config: Config, seed: int) -> Setup:
    """Return the simulator's setup for this deployment. Its KV is small: only an emulated link makes transfers slow."""
    token_bytes = 0 if build.link(config) is None else config.emulated.token_bytes
    return simulated.setup_of(config, replace(build.table(config) or Cost(), kv_token_bytes=token_bytes), seed)


def live(config: Config, arrivals: Sequence[Arrival], progress: Progress) -> tuple[list[Arrival], Times]:
    """Serve the requests live; return their actual arrivals and their times."""
    with running(config, progress, START_S):
        return asyncio.run(_served(config, arrivals))


async def _served(config: Config, arrivals: Sequence[Arrival]) -> tuple[list[Arrival], Times]:
    rng, start = Random(0), time.monotonic() + LEAD_S
    vocabulary = config.emulated.vocabulary
    sent: list[Arrival] = []

    async def ask(client: AsyncClient, arrival: Arrival, prompt: list[int]) -> Any:
        return await client.generate(prompt, max_tokens=arrival.output, ignore_eos=True)

    async with AsyncClient(config.clients_address, timeout=START_S) as client:
        tasks = []
        for arrival in arrivals:
            prompt = [rng.randrange(1, vocabulary) for _ in range(arrival.prompt)]
            await asyncio.sleep(max(0.0, start + arrival.at_s - time.monotonic()))
            sent.append(replace(arrival, at_s=time.monotonic() - start))
            tasks.append(asyncio.create_task(ask(client, arrival, prompt)))
        results = await asyncio.gather(*tasks)
    return sent, [(result.ttft_s, result.jct_s, result.slo_result == "met") for result in results]


def simulate(setup: Setup, arrivals: Sequence[Arrival]) -> Times:
    """Return the times of the requests in the simulator. Raises SimError."""
    outcomes = World(setup, arrivals).run().outcomes
    return [(outcome.ttft_s or 0.0, outcome.jct_s or 0.0, outcome.slo_result == "met") for outcome in outcomes]


def compared(true: Times, predicted: Times) -> dict[str, Any]:
    """Return mean and p99 of both and the share of the requests that kept their limits, and the relative error of the
    simulator. Goodput is that share times the same rate on both sides."""
    made: dict[str, Any] = {}
    for place, metric in enumerate(("ttft", "jct")):
        sides = [summarise(times[place] for times in side) for side in (true, predicted)]
        for share in ("mean", "p99"):
            made[f"{metric}_{share}"] = _off(*(getattr(side, share) for side in sides))
    made["slo_attainment"] = _off(*(sum(kept for *_, kept in side) / len(side) for side in (true, predicted)))
    return made


def _off(right: float, wrong: float) -> dict[str, float]:
    return {"live": right, "simulated": wrong, "off": wrong / right - 1 if right else float(wrong != right)}


def within(run: dict[str, Any], slack: float = 1.0) -> bool:
    """Whether every error is within its limit times `slack`."""
    return all(abs(made["off"]) <= slack * LIMITS[name.split("_")[1]] for name, made in run.items())


def measured(config: Config, arrivals: Sequence[Arrival], seed: int, progress: Progress) -> dict[str, Any]:
    """Serve these requests live and in the simulator, and compare."""
    sent, true = live(config, arrivals, progress)
    return compared(true, simulate(setup_of(config, seed), sent))


@click.command(cls=Program)
@click.option("--requests", type=click.IntRange(1), default=1000, show_default=True)
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True)
@click.option(
    "--rate", type=click.FloatRange(0, min_open=True), default=6.0, show_default=True, help="Requests per second."
)
@click.option("--prompt-tokens", default="lognormal:250:0.7", show_default=True)
@click.option("--output-tokens", default="lognormal:30:0.6", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the first run; each next run adds 1.")
@click.option(
    "--case", "name", metavar="NAME",
    help=f"A case of the sweep, such as {EXAMPLE}: its requests and limits, on adaptive instances.",
)  # fmt: skip
@click.option(
    "--load", "share", type=click.FloatRange(0, min_open=True), default=0.6, show_default=True,
    help="Of a case: the rate, as a share of what no arrangement exceeds.",
)  # fmt: skip
@overrides
@as_json
def main(
    requests: int, runs: int, rate: float, prompt_tokens: str, output_tokens: str, seed: int, name: str | None,
    share: float, overrides: tuple[str, ...], as_json: bool,
) -> None:  # fmt: skip
    """Serve the same requests live and in the simulator, and compare their times."""
    lengths = TokenCounts.parsed(prompt_tokens), TokenCounts.parsed(output_tokens)
    case = None if name is None else _case(name, requests)
    with one_line("parity", *EXPECTED, status=2), own_folder("parity") as folder:
        config = deployment(folder, overrides, case)
        made = []
        for number in range(seed, seed + runs):
            arrivals = drawn(requests, *lengths, number, rate) if case is None else case.arrivals(share * case.bound)
            made.append(measured(config, list(arrivals), number, progress))
    ok = all(map(within, made))
    settings: dict[str, Any] = {"requests": requests, "rate": rate}
    settings |= {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens}
    if case is not None:
        settings = {"requests": requests, "case": name, "load": share, "rate": share * case.bound}
    give({**settings, "limit": LIMITS, "ok": ok, "runs": made}, shown(made), as_json)
    sys.exit(0 if ok else 1)


def _case(name: str, requests: int) -> Case:
    """Return the case of the sweep with this name, with so many requests."""
    for case in cases.cases():
        if case.name == name:
            return replace(case, size=requests)
    raise click.BadParameter(f"no case {name!r}: WORKLOAD/COST/INSTANCES/REGIME, as in {EXAMPLE}", param_hint="--case")


def shown(runs: Sequence[dict[str, Any]]) -> str:
    """Format the comparison as a table."""
    rows = [
        [f"run {number}", name, f"{each['live']:.3f}", f"{each['simulated']:.3f}", f"{100 * each['off']:+.2f}"]
        for number, run in enumerate(runs, 1)
        for name, each in run.items()
    ]
    return table(("", "", "live", "simulated", "off %"), rows)


if __name__ == "__main__":
    main(prog_name="parity")
