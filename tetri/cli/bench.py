"""tetri-cli bench: measures servers with real traffic, tetri's and others, through OpenAI's API."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tetri import terminal
from tetri.cli import FAILED, OK, LazyGroup
from tetri.cli.options import COUNT, deployment_options
from tetri.paths import FILE, OUT_FILE, OUT_PLOT

if TYPE_CHECKING:
    from tetri.bench.compare.arrangements import Arrangement
    from tetri.bench.compare.compare import Bench
    from tetri.bench.compare.plan import Wanted

POSITIVE = click.FloatRange(0, min_open=True)
REGIMES = ("tight-ttft", "balanced", "tight-tpot")


@click.group("bench", cls=LazyGroup, lazy=("run", "compare"), prefix="bench_")
def command() -> None:
    """Measure servers with real traffic: tetri's arrangements and vLLM's own servers, on this machine."""


class Rate(click.types.StringParamType):
    """Requests per second, or a share of the capacity in percent."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the rate as it is written. Raises UsageError."""
        text = str(value)
        try:
            number = float(text.removesuffix("%"))
        except ValueError:
            number = 0.0
        if not 0 < number < 1e6:
            self.fail(f"{text!r} is neither requests per second nor a share such as 70%", param, ctx)
        return text


OPTIONS = (
    deployment_options,
    click.option("--workload", "workloads", multiple=True, metavar="NAME",
                 help="LPLD, LPHD, HPLD, HPHD, Mixed or session; may be repeated.  [default: Mixed]"),
    click.option("--trace", "traces", type=FILE, multiple=True, help="A trace as one more workload; may be repeated."),
    click.option("--shrink", type=COUNT, default=1, show_default=True, help="Divide the lengths of traces by this."),
    click.option("--requests", type=click.IntRange(2), default=100, show_default=True, help="Of each run."),
    click.option("--ttft", type=POSITIVE, help="Limit to the first token, in seconds; with --tpot, not a regime."),
    click.option("--tpot", type=POSITIVE, help="Limit of the mean time between two tokens, in seconds."),
    click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Draws other requests."),
    click.option("--eager", is_flag=True, help="Start vLLM without its compiler: a minute sooner, and slower."),
    click.option("--no-ticker", is_flag=True, help="Start no real-time processes that keep the machine awake."),
    click.option("--out", type=OUT_FILE, help="Keep each run in this file, and use those that it has."),
    click.option("--plot", type=OUT_PLOT, help="Plot to this PNG."),
)  # fmt: skip


def listed(*options: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator that adds the shared options after these."""
    return lambda function: reduce(lambda made, option: option(made), reversed((*options, *OPTIONS)), function)


@contextmanager
def opened(
    choose: Callable[[Mapping[str, Arrangement]], Sequence[Arrangement]], options: Mapping[str, Any]
) -> Iterator[tuple[Bench, Sequence[Arrangement]]]:
    """What a comparison works with, and the arrangements that `choose` chooses of all. Raises UsageError, ConfigError,
    ModelError and BenchError."""
    from tetri.bench.compare.arrangements import arrangements
    from tetri.bench.compare.awake import Awake
    from tetri.bench.compare.compare import Bench
    from tetri.bench.compare.servers import model_name
    from tetri.bench.compare.store import Store
    from tetri.bench.deployment import configured, own_folder
    from tetri.config import default_path
    from tetri.request import Slo

    conf, settings = (
        options["conf"] or default_path(),
        tuple(options["overrides"]),
    )
    _check_importable("aiohttp")
    with ExitStack() as stack:
        folder = stack.enter_context(own_folder("bench"))
        config = configured(conf, folder, "bench", settings)
        known = arrangements(config, eager=options["eager"])
        chosen = choose(known)
        context, vocabulary = _sizes(config)
        out = options["out"] or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "runs.jsonl"
        shared = {"model": model_name(config), "settings": [str(conf), *settings], "requests": options["requests"]}
        shared |= {name: options[name] for name in ("shrink", "seed", "ttft", "tpot", "eager")}
        shared["capacity_of"] = options.get("capacity_of") or options.get("name")
        store = Store(out, shared)
        store.read()
        awake = stack.enter_context(Awake(not options["no_ticker"]))
        bench = Bench(
            conf, settings, config, folder, known | {each.name: each for each in chosen},
            _workloads(options, context), vocabulary, options["requests"], options["seed"],
            Slo(ttft_s=options["ttft"], tpot_s=options["tpot"]), store, awake, terminal.tell,
        )  # fmt: skip
        yield bench, chosen


def _check_importable(name: str) -> None:
    from importlib.util import find_spec

    if find_spec(name) is None:
        raise click.UsageError(f"the client needs {name}: pip install 'tetri[bench]'")


def _sizes(config: Any) -> tuple[int, int]:
    """Context and vocabulary of the model."""
    from tetri import models

    if config.engine.kind == "emulated":
        return config.emulated.context, config.emulated.vocabulary
    context, vocabulary = models.shape(models.find(config.model.name))
    return min(config.model.context or context, context), vocabulary


def _workloads(options: Mapping[str, Any], context: int) -> dict[str, Any]:
    from tetri.bench.compare.traffic import Workload, names

    named = options["workloads"] or (() if options["traces"] else ("Mixed",))
    for name in named:
        if name not in names():
            raise click.UsageError(f"no workload {name!r}: choose from {', '.join(names())}, or give a --trace")
    made = [Workload(name, context) for name in named]
    made += [Workload(trace.stem, context, str(trace), options["shrink"]) for trace in options["traces"]]
    return {each.name: each for each in made}


def regimes_of(options: Mapping[str, Any], default: Sequence[str]) -> Sequence[str]:
    """The regimes to judge by, or the one of given limits. Raises UsageError."""
    from tetri.bench.compare.compare import GIVEN

    if (options["ttft"] is None) != (options["tpot"] is None):
        raise click.UsageError("give --ttft and --tpot together, or neither")
    return default if options["ttft"] is None and default else (GIVEN,)


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turn what a comparison cannot do into what the command line tells."""
    from tetri.bench.report import BenchError
    from tetri.proc.supervise import LaunchError
    from tetri.sim.traces import TraceError

    try:
        yield
    except TraceError as error:
        raise click.UsageError(str(error)) from None
    except BenchError as error:
        raise LaunchError(str(error)) from None


def reported(bench: Bench, wanted: Wanted, as_json: bool, plot: Path | None) -> int:
    """Print what the runs say, and draw it. Return the exit status: a comparison has failed if nothing was served."""
    from tetri.bench.compare import report

    found = report.findings(bench, wanted)
    if as_json:
        terminal.print_json(found)
    else:
        click.echo(report.shown(found))
    if plot is not None:
        from tetri.bench.compare.plot import draw

        draw(plot, report.times(bench, wanted), found)
    rows = [row for cell in found["cells"] for row in cell["arrangements"].values()]
    return OK if any("measured" in row for row in rows) else FAILED
