"""tetri-cli sim: simulates a deployment in virtual time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter
from types import MappingProxyType
from typing import Any

import click
from click.core import ParameterSource

from tetri import terminal
from tetri.cli import FAILED, OK, LazyGroup
from tetri.cli.options import examples, json_option
from tetri.paths import FILE, OUT_PLOT

LINKS = {"roce": 25e9, "nvlink": 300e9}  # bytes/s: 200 Gb/s and 300 GB/s (paper, section 4.1)
_EXAMPLES = examples(
    "tetri-cli sim run --requests 500 --rate 3 --prefill 2 --decode 2 --cost v100-opt13b",
    "tetri-cli sim run --requests 500 --rate 3 --prefill 2 --decode 2 --ttft 2 --tpot 0.1   # how many keep both",
    "tetri-cli sim run --requests 200 --rate 2 --faults drop=0.01,kill=0.01 --json",
)
SYSTEMS = ("tetri", "coupled16", "coupled")
# Settings of [monitor] without an effect here -> why.
NOT_SIMULATED = {"flip": "use --flip", "gone_s": "20 s with --faults, else endless", "cpus": "there are no processes"}


@click.group("sim", cls=LazyGroup, lazy=("paper", "replay", "sweep"), prefix="sim_")
def command() -> None:
    """Simulate a deployment. The simulator runs the schedulers of the live system."""


# Name, default, help. A tuple has the choices, the default first; a type is that of an option without a default.
OPTIONS: tuple[tuple[str, Any, str], ...] = (
    ("--trace", FILE, "Requests to replay: CSV or JSON lines, see below. May be a pipe."),
    ("--speedup", 1.0, "Divide the times between the trace's requests by this."),
    ("--requests", 0, "Number of requests; a shorter trace is repeated. 0: the whole trace, or 1000 drawn requests."),
    ("--rate", 0.0, "Drawn requests per second; 0: all at once."),
    ("--burstiness", 1.0, "Coefficient of variation of the times between drawn requests; 1: Poisson."),
    ("--prompt-tokens", "512", "Prompt lengths: N, LOW-HIGH or lognormal:MEDIAN:SIGMA."),
    ("--output-tokens", "128", "Output lengths, as --prompt-tokens."),
    ("--deadline", click.FLOAT, "Deadline of every request, in seconds."),
    ("--ttft", click.FLOAT, "Limit to the first token, in seconds (default: as a broker finds it)."),
    ("--tpot", click.FLOAT, "Limit of the mean time between two tokens, in seconds (default: likewise)."),
    ("--system", SYSTEMS, "coupled16, coupled: every instance runs both phases of its requests."),
    ("--prefill", 1, "Prefill instances."),
    ("--decode", 1, "Decode instances."),
    ("--mixed", 0, "Instances that do both."),
    ("--auto", 0, "Instances that do both, as far apart as the traffic asks."),
    ("--cost", "v100-opt13b", "Name of a table in conf/cost, or a file."),
    ("--link", "roce", "roce, nvlink or bytes per second."),
    ("--transfer", "chunk", "chunk: send KV after every chunk; request: after the whole prompt."),
    ("--flip", "none", "Flip policy: none, idle, below or balance (docs/policies.md)."),
    ("--chunk-tokens", 0, "Tokens per step; 0: as in the cost table."),
    ("--kv-tokens", 0, "KV memory per instance, in tokens; 0: as in the cost table."),
    ("--block-tokens", 16, "Tokens of a KV block."),
    ("--max-batch", 256, "Maximum decode batch."),
    ("--context", 0, "Maximum tokens of a request; 0: as --kv-tokens."),
    ("--seed", 0, "Seed of all random numbers."),
    ("--plot", OUT_PLOT, "Plot TTFT, JCT and the instances to this PNG."),
)


def _listed(function: Callable[..., Any]) -> Callable[..., Any]:
    for name, of, text in reversed(OPTIONS):
        kind = click.Choice(of) if isinstance(of, tuple) else of if isinstance(of, click.ParamType) else None
        default = of[0] if isinstance(of, tuple) else of if kind is None else None
        function = click.option(name, type=kind, default=default, show_default=default is not None, help=text)(function)
    return function


class RunCommand(click.Command):
    """Explains traces and faults only to who asks for help: the simulator is slow to import."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the formats of traces, and the faults, with their units."""
        from tetri.sim.faulty.chance import CHANCES, RATES, TIMES
        from tetri.sim.traces import FORMATS

        with formatter.section("Traces, by their columns: arrival, prompt tokens, output tokens"):
            formatter.write_dl([(form.name, f"{', '.join(form.columns)} ({form.unit})") for form in FORMATS])
        titles = ("Faults: a chance from 0 to 1", "Faults: times a second", "Faults: seconds")
        for title, kinds in zip(titles, (CHANCES, RATES, TIMES), strict=True):
            with formatter.section(title):
                formatter.write_dl([*kinds.items()])
        super().format_epilog(ctx, formatter)


@command.command("run", cls=RunCommand, epilog=_EXAMPLES)
@_listed
@click.option("--faults", metavar="NAME=NUMBER,...", help="Faults to inject, as in drop=0.01,kill=0.001; see below.")
@click.option("--cuts", metavar="READER,...", help="Instances that cannot read KV, as in d1 or p0>d0@5-20 (seconds).")
@click.option(
    "--policy", "policies", multiple=True, metavar="KEY=VALUE", help="A setting of [policy]; may be repeated."
)
@click.option(
    "--monitor", "monitors", multiple=True, metavar="KEY=VALUE", help="A setting of [monitor]; may be repeated."
)
@json_option
def run(**options: Any) -> int:
    """Simulate a trace or drawn requests, and print latencies and loads.

    The same arguments give the same result to the last bit, except the object "run" (wall time and memory).
    """
    from tetri.cost import CostError
    from tetri.faults import FaultsError
    from tetri.sim.report import table
    from tetri.sim.setup import PromiseBroken, SimError
    from tetri.sim.traces import TraceError

    try:
        made, result = simulated(options)
    except PromiseBroken as error:
        terminal.tell(f"tetri-cli: a promise is broken: {error}")
        return FAILED
    except FaultsError as error:
        raise click.UsageError(f"--faults: {error}") from None
    except (SimError, TraceError, CostError) as error:
        raise click.UsageError(str(error)) from None
    if options["as_json"]:
        terminal.print_json(made)
    else:
        for note in made["notes"]:
            terminal.tell(f"tetri-cli: {options['trace']}: {note}")
        click.echo(table(made))
    if options["plot"] is not None:
        from tetri.bench.plots import draw

        draw(options["plot"], _times(result), {iid: use.spans or [] for iid, use in result.instances.items()})
    return OK


def simulated(options: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """(the result as JSON data, the result to plot). Raises SimError, TraceError, CostError, FaultsError, ConfigError
    or UsageError."""
    from tetri.sim.baselines import serve
    from tetri.sim.kernel import uncollected
    from tetri.sim.report import summary

    started = perf_counter()
    if options["system"] != "tetri":
        _check_coupled(options)
    setup = _setup(options)
    arrivals, total, notes = _arrivals(options)
    with uncollected():
        if options["system"] == "tetri":
            with progress_bar(total) as progress:
                result = _world(setup, arrivals, options["faults"], options["cuts"], progress).run()
        else:
            result = serve(options["system"], setup, arrivals)
    made = summary(result)
    run = {"wall_s": perf_counter() - started, "peak_rss_mb": _peak_rss_mb()}
    return {**made, "notes": notes, "run": run}, result


def _world(setup: Any, arrivals: Iterable[Any], faults: str | None, cuts: str | None, progress: Any) -> Any:
    from tetri.sim.world import World

    if faults is None and not cuts:
        return World(setup, arrivals, progress)
    from tetri.sim.faulty.chance import Faults, parse_faults
    from tetri.sim.faulty.world import FaultyWorld, lively

    found = Faults(until=0.0) if faults is None else parse_faults(faults)
    return FaultyWorld(lively(setup), arrivals, found, progress, cuts=_cuts(cuts or ""))


def _cuts(text: str) -> tuple[Any, ...]:
    """The cuts of --cuts. Raises UsageError."""
    from tetri.faults import FaultsError, parse_cuts

    try:
        cuts = parse_cuts(text)
    except FaultsError as error:
        raise click.UsageError(f"--cuts: {error}") from None
    if any(cut.by_file for cut in cuts):
        raise click.UsageError("--cuts: there is no file in a simulation: give seconds")
    return cuts


def _check_coupled(options: dict[str, Any]) -> None:
    """Refuse options that a coupled baseline would ignore. Raises UsageError."""
    given = {"policy": options["policies"], "monitor": options["monitors"], "deadline": options["deadline"] is not None}
    given |= {"flip": options["flip"] != "none", "faults": options["faults"] is not None, "cuts": bool(options["cuts"])}
    for name, there in given.items():
        if there:
            raise click.UsageError(f"--system {options['system']} schedules as vLLM does: leave out --{name}")


def _setup(options: dict[str, Any]) -> Any:
    from tetri import cost
    from tetri.config.tables import MonitorConfig, PolicyConfig
    from tetri.policy.rules import Rules
    from tetri.policy.views import FlipSettings
    from tetri.request import Slo
    from tetri.sim.setup import Setup

    monitor = _section(MonitorConfig, "--monitor", options["monitors"], NOT_SIMULATED)
    direct = ("prefill", "decode", "mixed", "auto", "transfer", "chunk_tokens", "kv_tokens", "block_tokens")
    return Setup(
        cost=cost.load(options["cost"]),
        slo=Slo(ttft_s=options["ttft"], tpot_s=options["tpot"]),
        rules=_picked(Rules, _section(PolicyConfig, "--policy", options["policies"])),
        flip=options["flip"],
        flip_settings=_picked(FlipSettings, monitor),
        load_s=monitor.load_ms / 1000,
        stale_s=monitor.stale_s,
        link_bytes_s=link_bytes_s(options["link"]),
        context=options["context"],
        max_batch=options["max_batch"],
        seed=options["seed"],
        spans=options["plot"] is not None,
        **{name: options[name] for name in direct},
    )


def _section(kind: type, option: str, pairs: Iterable[str], refused: Mapping[str, str] = MappingProxyType({})) -> Any:
    """A section of the configuration: the settings in `pairs`, else the defaults. Raises UsageError, ConfigError."""
    import tomllib

    from tetri.strict import section

    table: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = (part.strip() for part in pair.partition("="))
        if not equals:
            raise click.UsageError(f"{option} {pair!r}: write key=value")
        if key in refused:
            raise click.UsageError(f"{option} {key}: {refused[key]}")
        try:
            table[key] = tomllib.loads(f"value = {text}")["value"]
        except (ValueError, RecursionError):
            table[key] = text  # text without quotes
    return section(kind, table, option, option.removeprefix("--"))


def _picked(kind: type, source: Any) -> Any:
    """Build a `kind` from the fields of the same names in `source`."""
    from dataclasses import fields

    return kind(**{field.name: getattr(source, field.name) for field in fields(kind)})


def link_bytes_s(link: str) -> float:
    """Bytes a second of a link: its name in LINKS, or the number. Raises UsageError."""
    if link in LINKS:
        return LINKS[link]
    try:
        return float(link)
    except ValueError:
        raise click.UsageError(f"--link must be {', '.join(LINKS)} or bytes a second, got {link!r}") from None


def _arrivals(options: dict[str, Any]) -> tuple[Iterable[Any], int, list[str]]:
    """(requests, their number, notes on the trace). Raises TraceError and UsageError."""
    from tetri.sim.traces import TokenCounts, drawn, replayed, with_deadline

    requests, trace = options["requests"], options["trace"]
    arrivals: Iterable[Any]
    notes: list[str] = []
    if trace is not None:
        _check_unused(("rate", "burstiness"), "--trace brings its own times: use --speedup")
        _check_unused(("prompt_tokens", "output_tokens"), "--trace brings its own lengths: use these")
        arrivals, total, notes = replayed(trace, options["speedup"], requests)
    else:
        _check_unused(("speedup",), "drawn requests have --rate")
        total = requests or 1000
        prompt, output = TokenCounts.parsed(options["prompt_tokens"]), TokenCounts.parsed(options["output_tokens"])
        arrivals = drawn(total, prompt, output, options["seed"], options["rate"], options["burstiness"])
    if options["deadline"] is not None:
        arrivals = with_deadline(arrivals, options["deadline"])
    return arrivals, total, notes


def _check_unused(names: Sequence[str], why: str) -> None:
    """Raises UsageError when one of these options is given: it would have no effect."""
    context = click.get_current_context()
    for name in names:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{why}, not --{name.replace('_', '-')}")


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[int], None] | None]:
    """Show a bar on stderr and yield a function that takes the number of finished parts; None without a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("simulating"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        step = max(1, total // 200)

        def advance(finished: int) -> None:
            if finished % step == 0:
                bar.update(task, completed=finished)

        yield advance


def _times(result: Any) -> dict[str, list[float]]:
    """The values of the plotted CDFs in seconds, by name."""
    return {name: [getattr(o, f"{name.lower()}_s") for o in result.done()] for name in ("TTFT", "JCT")}


def _peak_rss_mb() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
