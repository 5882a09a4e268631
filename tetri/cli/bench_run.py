"""tetri-cli bench run: one arrangement, or servers that run already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tetri.cli.bench import Rate, listed, opened, regimes_of, reported, usage_errors
from tetri.cli.options import examples, json_option

if TYPE_CHECKING:
    from tetri.bench.compare.arrangements import Arrangement

_EXAMPLES = examples(
    "tetri-cli bench run --rate 1                                 # two adaptive instances, Mixed",
    "tetri-cli bench run --arrangement vllm --rate 1              # one vLLM server on all CPUs",
    "tetri-cli bench run --url http://127.0.0.1:8000 --rate 1     # a server that runs already",
)


@click.command("run", epilog=_EXAMPLES)
@listed(
    click.option("--arrangement", "name", default="tetri-auto", show_default=True,
                 help="What to start: see bench compare."),
    click.option("--url", "urls", multiple=True, metavar="URL",
                 help="Start nothing, and ask this server of OpenAI's API for the configuration's model; may be"
                 " repeated."),
    click.option("--routing", type=click.Choice(["least", "rr"]), default="least", show_default=True,
                 help="Among several --url: the one with the fewest outstanding requests, or each in turn."),
    click.option("--rate", type=Rate(), default="70%", show_default=True,
                 help="Requests per second, or a share of the capacity."),
)  # fmt: skip
@json_option
def command(as_json: bool, plot: Path | None, **options: Any) -> int:
    """Measure one arrangement, or servers that run already: TTFT, TPOT, JCT, and how many requests keep the limits."""
    from tetri.bench.compare.arrangements import Arrangement
    from tetri.bench.compare.compare import compare
    from tetri.bench.compare.plan import Wanted

    def choose(known: Mapping[str, Arrangement]) -> Sequence[Arrangement]:
        urls = tuple(url.rstrip("/").removesuffix("/v1") for url in options["urls"])
        if urls:
            return [Arrangement("url", ", ".join(urls), urls=urls, routing=options["routing"])]
        if options["name"] not in known:
            raise click.UsageError(f"--arrangement must be one of {', '.join(known)}")
        return [known[options["name"]]]

    # Of servers that run already nothing is known by which limits could be derived.
    regimes = regimes_of(options, () if options["urls"] else ("balanced",))
    with usage_errors(), opened(choose, options) as (bench, chosen):
        wanted = Wanted(chosen, [*bench.workloads], [options["rate"]], regimes, 1)
        compare(bench, wanted, chosen[0].name)
        return reported(bench, wanted, as_json, plot)
