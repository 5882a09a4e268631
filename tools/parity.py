"""Whether the simulator tells the truth: the same requests, live on emulated engines and simulated by the same cores.

Both are asked for what the broker saw of every request: its time to the first token and to the end. The simulator is
given the moments at which the live requests were really sent, so that only the serving is compared.

    tools/parity --runs 3 --requests 1000

Prints one JSON object; exit status 1 when a mean differs by more than 5 % or a 99th percentile by more than 10 %.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from random import Random
from typing import Any

import click

from tetri.client import AsyncClient
from tetri.config import Config, load
from tetri.metrics import summarise
from tetri.proc import build, launch
from tetri.sim.setup import Setup
from tetri.sim.traces import Arrival, TokenCounts, drawn
from tetri.sim.world import World

BOUNDS = {"mean": 0.05, "p99": 0.10}
START_S = 60.0
LEAD_S = 0.5  # before the first request
REPOSITORY = Path(__file__).parent.parent

Times = Sequence[tuple[float, float]]  # (TTFT, JCT) of each request, seconds


def configured(overrides: Sequence[str]) -> Config:
    """A deployment of emulated engines with steps of 27 ms and more, in a run directory of its own."""
    folder = tempfile.mkdtemp(prefix="tetri-parity-")
    steps = ["engine.cost=v100-opt13b.toml", "emulated.context=4096"]
    own = [f"cluster.run_dir={folder}", f"cluster.name=parity-{os.getpid()}"]
    return load(REPOSITORY / "conf" / "emulated.toml", [*steps, *own, *overrides])


def setup_of(config: Config, seed: int) -> Setup:
    """The same deployment, to be simulated. Its KV is small: moving it takes no time but that of an emulated link."""
    roles = [worker.role for worker in config.workers]
    link = build.link(config)
    return Setup(
        cost=replace(build.predicted(config), kv_token_bytes=0 if link is None else config.emulated.token_bytes),
        link_bytes_s=inf if link is None else link.bytes_s,
        **{role: roles.count(role) for role in ("prefill", "decode", "mixed")},
        rules=build.rules(config),
        kv_tokens=config.emulated.blocks * config.engine.block_tokens,
        block_tokens=config.engine.block_tokens,
        chunk_tokens=config.engine.chunk_tokens,
        max_batch=config.engine.max_batch,
        context=config.emulated.context,
        slots=config.transfer.slab_blocks,
        reserve_share=config.transfer.reserve_share,
        seed=seed,
        flip=config.monitor.flip,
        flip_settings=build.flip_settings(config),
        load_s=config.monitor.load_ms / 1000,
        heartbeat_s=config.cluster.heartbeat_s,
        stream_interval=config.engine.stream_interval,
    )


def live(config: Config, arrivals: Sequence[Arrival], say: Callable[[str], None]) -> tuple[list[Arrival], Times]:
    """Serve them for real. The arrivals as they really were, and the times."""
    run_dir = launch.up(config, say, START_S)
    try:
        return asyncio.run(_served(config, arrivals))
    finally:
        launch.down(run_dir)


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
    return sent, [(result.ttft_s, result.jct_s) for result in results]


def simulated(setup: Setup, arrivals: Sequence[Arrival]) -> Times:
    outcomes = World(setup, arrivals).run().outcomes
    return [(outcome.ttft_s or 0.0, outcome.jct_s or 0.0) for outcome in outcomes]


def compared(true: Times, told: Times) -> dict[str, Any]:
    """Mean and p99 of both, and by what share the simulator is off."""
    made: dict[str, Any] = {}
    for place, metric in enumerate(("ttft", "jct")):
        sides = [summarise(times[place] for times in side) for side in (true, told)]
        for share in BOUNDS:
            right, wrong = (getattr(side, share) for side in sides)
            made[f"{metric}_{share}"] = {"live_s": right, "simulated_s": wrong, "off": wrong / right - 1}
    return made


def within(run: dict[str, Any], slack: float = 1.0) -> bool:
    """Whether every figure is within its bound, times `slack`."""
    return all(abs(made["off"]) <= slack * BOUNDS[name.split("_")[1]] for name, made in run.items())


def measured(
    config: Config,
    requests: int,
    rate: float,
    lengths: tuple[TokenCounts, TokenCounts],
    seed: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """One run, live and simulated."""
    arrivals = list(drawn(requests, *lengths, seed, rate))
    sent, true = live(config, arrivals, say)
    return compared(true, simulated(setup_of(config, seed), sent))


@click.command()
@click.option("--requests", type=click.IntRange(1), default=1000, show_default=True)
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True)
@click.option("--rate", type=click.FloatRange(0, min_open=True), default=6.0, show_default=True, help="Per second.")
@click.option("--prompt-tokens", default="lognormal:250:0.7", show_default=True)
@click.option("--output-tokens", default="lognormal:30:0.6", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the first run; the next ones count up.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting.")
def main(
    requests: int, runs: int, rate: float, prompt_tokens: str, output_tokens: str, seed: int, overrides: tuple[str, ...]
) -> None:
    config = configured(overrides)

    def say(text: str) -> None:
        click.echo(text, err=True)

    lengths = TokenCounts.parsed(prompt_tokens), TokenCounts.parsed(output_tokens)
    try:
        made = [measured(config, requests, rate, lengths, seed + number, say) for number in range(runs)]
    finally:
        shutil.rmtree(config.run_dir, ignore_errors=True)
    good = all(map(within, made))
    settings = {"requests": requests, "rate": rate, "prompt_tokens": prompt_tokens, "output_tokens": output_tokens}
    click.echo(json.dumps({**settings, "bounds": BOUNDS, "within": good, "runs": made}, indent=2))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
