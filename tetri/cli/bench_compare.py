"""tetri-cli bench compare: arrangements of the same CPUs against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tetri.cli.bench import REGIMES, Rate, listed, opened, regimes_of, reported, usage_errors
from tetri.cli.options import COUNT, examples, json_option

if TYPE_CHECKING:
    from tetri.bench.compare.arrangements import Arrangement

_EXAMPLES = examples(
    "tetri-cli bench compare --out runs.jsonl --plot runs.png",
    "tetri-cli bench compare --arrangement 'tetri-*' --workload LPHD --rate 1.5 --repeats 2",
    "tetri-cli bench compare --rate 60% --rate 75% --rate 90% --out rates.jsonl   # the highest rate that attains 90 %",
)


@click.command("compare", epilog=_EXAMPLES)
@listed(
    click.option(
        "--arrangement", "globs", multiple=True, metavar="GLOB", default=("*",), show_default=True,
        help="Such arrangements only: vllm, vllm-N-rr, vllm-N-least, vllm-N-CHUNK-..., tetri-P+D, tetri-mixed,"
        " tetri-auto; may be repeated.",
    ),
    click.option("--rate", "rates", type=Rate(), multiple=True, default=("70%",), show_default=True,
                 help="Requests per second, or a share of the capacity; may be repeated."),
    click.option("--capacity-of", metavar="NAME",
                 help="Shares are of this arrangement's capacity.  [default: vllm-N-least, else the first one]"),
    click.option("--regime", "regimes", type=click.Choice([*REGIMES]), multiple=True,
                 help="Limits of latency, derived from this machine; may be repeated.  [default: balanced]"),
    click.option("--repeats", type=COUNT, default=3, show_default=True, help="Of everything, in alternating order."),
)  # fmt: skip
@json_option
def command(as_json: bool, plot: Path | None, **options: Any) -> int:
    """Compare arrangements of the same CPUs: vLLM's servers, and tetri with fixed and adaptive roles.

    Each is started in turn and serves the same requests at the same times, of which the client knows only what any
    client of OpenAI's API does. The capacity is the throughput with 64 requests in flight. In brackets beside each
    value: what the simulator says, with the cost table of this machine. In the background, with --out: an interrupted
    comparison goes on where it was."""
    from tetri.bench.compare.compare import compare
    from tetri.bench.compare.plan import Wanted

    def choose(known: Mapping[str, Arrangement]) -> Sequence[Arrangement]:
        found = [each for name, each in known.items() if any(fnmatch(name, glob) for glob in options["globs"])]
        if not found:
            raise click.UsageError(f"--arrangement must match one of {', '.join(known)}")
        if options["capacity_of"] not in (None, *known):
            raise click.UsageError(f"--capacity-of must be one of {', '.join(known)}")
        return found

    regimes = regimes_of(options, options["regimes"] or ("balanced",))
    with usage_errors(), opened(choose, options) as (bench, chosen):
        wanted = Wanted(chosen, [*bench.workloads], options["rates"], regimes, options["repeats"])
        compare(bench, wanted, options["capacity_of"] or _rival(bench.arrangements))
        return reported(bench, wanted, as_json, plot)


def _rival(known: Mapping[str, Arrangement]) -> str:
    """The arrangement whose capacity counts if none is named."""
    return next((name for name in known if fnmatch(name, "vllm-*-least")), next(iter(known)))
