"""tetri-cli size: how many instances of each role a load needs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from math import inf, isnan
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import click

from tetri import terminal
from tetri.cli import FAILED, OK
from tetri.cli.options import COUNT, Overrides, deployment_options, examples, json_option
from tetri.cli.sim import LINKS, link_bytes_s
from tetri.cli.units import NOTHING, seconds
from tetri.paths import FILE

if TYPE_CHECKING:
    from tetri.sim.pools import Demand, Goal, Lengths, Served
    from tetri.sim.setup import Setup
    from tetri.sim.sizing import Answer, Checked, Sizing

RATE = click.FloatRange(1e-6, 1e6)  # at a lower one, times of steps are lost beside those of arrivals
POSITIVE = click.FloatRange(0, 1e6, min_open=True)
SEED, CHECK_SEED = 0, 1
BOUNDS = {
    "compute": "compute",
    "ttft": "TTFT: prompts wait for each other",
    "tpot": "TPOT: a larger batch has longer steps",
    "kv_memory": "KV memory",
    "max_batch": "max_batch",
    "link": "the link, which carries KV all the time",
}
_ROW = "{:<13}{:>10}{:>6}{:>11}{:>11} {:>6}{:>9}   {}"
_EXAMPLES = examples(
    "tetri-cli size --rate 5 --prompt 1000 --output 200 --ttft 2 --tpot 0.1",
    "tetri-cli size --rate 5 --prompt 1000 --output 200 --ttft 2 --tpot 0.1 --cost v100-opt13b --verify",
    "tetri-cli size --rate 5 --prompt lognormal:800:0.8 --output 20-400 --ttft 8 --tpot 0.1 --share 0.99   # p99",
)
# Name, type, help.
_OPTIONS: tuple[tuple[str, Any, str], ...] = (
    ("--rate", RATE, "Requests per second; a Poisson process."),
    ("--prompt", None, "Prompt lengths in tokens: N, LOW-HIGH or lognormal:MEDIAN:SIGMA."),
    ("--output", None, "Output lengths, as --prompt."),
    ("--trace", FILE, "Take the lengths from this trace instead (formats: tetri-cli sim run --help)."),
    ("--ttft", POSITIVE, "Most seconds to the first token."),
    ("--tpot", POSITIVE, "Most seconds for each token after it."),
    ("--cost", None, "Name of a table in conf/cost, or a file: hardware other than that of the configuration."),
    ("--link", None, f"For KV: {', '.join(LINKS)} or bytes per second (default: as configured; with --cost: roce)."),
    ("--max-batch", COUNT, "Maximum decode batch (default: as configured; with --cost: 256)."),
    ("--chunk-tokens", COUNT, "Tokens per step (default: as configured; with --cost: as in the table)."),
    ("--kv-tokens", COUNT, "KV memory per instance, in tokens (default: likewise)."),
)


def _listed(function: Callable[..., Any]) -> Callable[..., Any]:
    for name, kind, text in reversed(_OPTIONS):
        function = click.option(name, type=kind, required=name in ("--rate", "--ttft", "--tpot"), help=text)(function)
    return function


@click.command("size", epilog=_EXAMPLES)
@_listed
@click.option(
    "--share",
    type=click.FloatRange(0.01, 0.999),
    default=0.9,
    show_default=True,
    help="Share of the requests within each limit; 0.9: the limits are for the p90.",
)
@click.option(
    "--verify",
    is_flag=True,
    help="Also serve the load in the simulator, with the live schedulers: half a minute, two if a limit is near.",
)
@deployment_options
@json_option
def command(verify: bool, as_json: bool, **options: Any) -> int:
    """Say how many prefill and decode instances keep a limit of TTFT and one of TPOT at a rate of requests.

    The answer comes from a model of queues and batches, with the step times of the cost table. Exit status 1: --verify
    finds that these instances miss a limit, or that fewer would do."""
    from tetri.cost import CostError
    from tetri.sim.pools import Demand, Goal
    from tetri.sim.setup import SimError
    from tetri.sim.sizing import SizingError, checked, size
    from tetri.sim.traces import TraceError

    goal = Goal(options["rate"], options["ttft"], options["tpot"], options["share"])
    if any(isnan(value) for value in dataclasses.astuple(goal)):
        raise click.UsageError("--rate, --ttft, --tpot and --share must be numbers")
    try:
        setup, lengths = _setup(options), _lengths(options)
        demand = Demand(goal, setup, lengths, SEED)
        sizing = size(demand)
        checks = checked(Demand(goal, setup, lengths, CHECK_SEED), sizing) if verify else []
    except (SizingError, SimError, TraceError, CostError) as error:
        raise click.UsageError(str(error)) from None
    if as_json:
        terminal.print_json(_record(goal, sizing, checks))
    else:
        click.echo("\n".join(_report(demand, sizing, checks)))
    return OK if all(each.reached == each.expected for each in checks) else FAILED


# ---------------------------------------------------------------- the load and the hardware


def _lengths(options: dict[str, Any]) -> Lengths:
    """A sample of the requests. Raises TraceError and UsageError."""
    from tetri.sim.pools import SAMPLE, sampled
    from tetri.sim.traces import TokenCounts, replayed

    prompt, output = options["prompt"], options["output"]
    if options["trace"] is not None:
        if prompt or output:
            raise click.UsageError("--trace brings its own lengths: leave out --prompt and --output")
        lengths = [(each.prompt, each.output) for each in replayed(options["trace"]).arrivals]
        return lengths if len(lengths) <= SAMPLE else Random(SEED).sample(lengths, SAMPLE)
    if not (prompt and output):
        raise click.UsageError("give --prompt and --output, the lengths in tokens, or --trace")
    return sampled(TokenCounts.parsed(prompt), TokenCounts.parsed(output), SEED)


def _setup(options: dict[str, Any]) -> Setup:
    """One instance and the link, as --cost or the configuration describes them. Raises CostError, ConfigError and
    UsageError."""
    from tetri import cost
    from tetri.sim.setup import Setup

    conf, overrides = options["conf"], options["overrides"]
    if options["cost"] is None:
        made = _configured(conf, overrides)
    elif conf or overrides:
        raise click.UsageError("--cost describes the hardware without a configuration: leave out --conf and --set")
    else:
        made = Setup(cost.load(options["cost"]), link_bytes_s=LINKS["roce"])
    given = {name: options[name] for name in ("max_batch", "chunk_tokens", "kv_tokens") if options[name]}
    if options["link"]:
        given["link_bytes_s"] = link_bytes_s(options["link"])
    made = dataclasses.replace(made, **given)
    held = (made.kv_tokens or made.cost.kv_tokens) // made.block_tokens * made.block_tokens
    return dataclasses.replace(made, context=min(made.context, held))


def _configured(conf: Path | None, overrides: Overrides) -> Setup:
    """An instance of the configuration. Raises CostError, ConfigError and UsageError."""
    from tetri import cost
    from tetri.bench.simulated import setup_of
    from tetri.config import default_path, load
    from tetri.proc import build, measured_cost

    config = load(conf or os.environ.get("TETRI_CONF") or default_path(), overrides)
    table = build.table(config)
    if table is None and config.engine.measures and (kept := measured_cost.kept(config.model.name)):
        table = cost.load(kept[0])
    if table is None:
        advice = "give --cost, or start it once with engine.cost = auto"
        raise click.UsageError(f"there is no cost table for this configuration (engine.cost): {advice}")
    return dataclasses.replace(setup_of(config, table), prefill=1, decode=1, mixed=0, auto=0)


# ---------------------------------------------------------------- the answer


def _record(goal: Goal, sizing: Sizing, checks: Sequence[Checked]) -> dict[str, Any]:
    answers = {role: getattr(sizing, role) for role in ("prefill", "decode", "coupled")}
    return {
        "goal": dataclasses.asdict(goal),
        **{role: None if answer is None else _answer(answer) for role, answer in answers.items()},
        "verified": [dataclasses.asdict(each) for each in checks],
    }


def _answer(answer: Answer) -> dict[str, Any]:
    """JSON has no infinity: what falls behind has null."""
    pools = {"enough": answer.enough, "fewer": answer.fewer}
    return {name: None if pool is None else _pool(pool) for name, pool in pools.items()} | {"bound": answer.bound}


def _pool(pool: Served) -> dict[str, Any]:
    made = dataclasses.asdict(pool)
    return {name: None if value == inf else value for name, value in made.items()} | {"falls_behind": pool.behind}


def _report(demand: Demand, sizing: Sizing, checks: Sequence[Checked]) -> Iterator[str]:
    goal, capacity, percentile = demand.goal, demand.capacity, f"p{100 * demand.goal.share:g}"
    prefill, decode = sizing.prefill.enough.instances, sizing.decode.enough.instances
    yield f"{prefill} prefill + {decode} decode for {goal.rate:g} requests/s with"
    yield f"  {percentile} of TTFT <= {goal.ttft_s:g} s, {percentile} of TPOT <= {goal.tpot_s:g} s,"
    yield (
        f"  instances of {demand.kv_tokens} tokens of KV, {capacity.chunk_tokens} tokens a chunk,"
        f" {capacity.max_batch} requests a batch"
    )
    yield ""
    latencies = f"TTFT {percentile}", f"TPOT {percentile}"
    yield _ROW.format("", "instances", "busy", *latencies, "batch", "KV used", "bound by")
    yield from _rows("prefill", sizing.prefill, goal)
    yield from _rows("decode", sizing.decode, goal)
    if sizing.coupled is None:
        yield "coupled alone: no number of instances keeps the limits"
    else:
        yield from _rows("coupled alone", sizing.coupled, goal)
    yield ""
    if not checks:
        yield "By a model of queues and batches; --verify simulates these deployments with the live schedulers."
        return
    yield "Simulated with the live schedulers (prefill + decode):"
    for each in checks:
        made = f"TTFT {seconds(each.ttft_s)}, TPOT {seconds(each.tpot_s)}"
        found = "keeps the limits" if each.reached else "misses a limit"
        found += "" if each.sure else ", but only just"
        as_sized = "" if each.reached == each.expected else ", unlike the model"
        yield f"  {each.prefill} + {each.decode}: {made}: {found}{as_sized}"


def _rows(role: str, answer: Answer, goal: Goal) -> Iterator[str]:
    yield _row(role, answer.enough, BOUNDS[answer.bound])
    if answer.fewer is not None:
        late = "misses TTFT" if (answer.fewer.ttft_s or 0.0) > goal.ttft_s else "misses TPOT"
        yield _row("  one fewer", answer.fewer, "falls behind more and more" if answer.fewer.behind else late)


def _row(name: str, pool: Served, why: str) -> str:
    ttft, tpot = (NOTHING if value in (None, inf) else seconds(value) for value in (pool.ttft_s, pool.tpot_s))
    batch, memory = (NOTHING, NOTHING) if pool.batch is None else (f"{pool.batch:.1f}", f"{pool.memory:.0%}")
    return _ROW.format(name, pool.instances, f"{pool.busy:.0%}", ttft, tpot, batch, memory, why)
