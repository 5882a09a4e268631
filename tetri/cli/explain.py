"""tetri-cli explain: how a request was served."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from tetri import atomic, terminal
from tetri.cli.columns import aligned
from tetri.cli.options import (
    COUNT,
    TEXT,
    Overrides,
    connect,
    deployment_options,
    examples,
    json_option,
    timeout_option,
)
from tetri.cli.units import NOTHING, ago, count, seconds
from tetri.core.broker.history import ENDS
from tetri.paths import OUT_FILE
from tetri.request import rid_of
from tetri.wire.observation import Ended, Timeline

if TYPE_CHECKING:
    from rich.console import Console

LAST = 20  # requests that are listed
_CHOICE = re.compile(r"(.+)\.(\d{1,4})", re.ASCII)  # see tetri.request.choice_id
_FAILED = ("error", "deadline")
_TITLES = ("request", "ended", "reason", "TTFT", "TPOT", "JCT", "limits", "attempts", "prompt", "output", "instances")
_EXAMPLES = examples(
    "tetri-cli explain   # lists the last requests",
    "tetri-cli explain 5f2c9a1e03b7d8460c1d2e3f4a5b6c7d",
    "tetri-cli explain chatcmpl-5f2c9a1e03b7d8460c1d2e3f4a5b6c7d --choice 1 --perfetto trace.json",
    "tetri-cli explain --slowest --last 50 --perfetto slowest.json",
)


@click.command("explain", epilog=_EXAMPLES)
@click.argument("rid", type=TEXT, required=False)
@click.option("--choice", type=click.IntRange(0, 9999), help="The choice of a request with several (default: 0).")
@click.option("--slowest", is_flag=True, help="Without RID: list those with the longest JCT, the longest last.")
@click.option("--failed", is_flag=True, help="Without RID: list those that ended by an error or their deadline.")
@click.option("--last", type=COUNT, default=LAST, show_default=True, help=f"Without RID: so many, of the last {ENDS}.")
@click.option("--perfetto", type=OUT_FILE, help="Write a trace of what is shown, for ui.perfetto.dev.")
@json_option
@deployment_options
@timeout_option
def command(
    rid: str | None,
    choice: int | None,
    perfetto: Path | None,
    as_json: bool,
    conf: Path | None,
    overrides: Overrides,
    timeout: float,
    **selection: Any,
) -> None:
    """Show how request RID was served, or is: its stages, and each chunk, transfer, step, retry and preemption.

    RID is the id of the request, of a choice (RID.1) or of an HTTP answer (cmpl-RID, chatcmpl-RID). Without RID, list
    the requests that ended last, the newest last. The broker keeps the timelines of about 10,000 ended requests."""
    for name in ("slowest", "failed", "last") if rid is not None else ():
        if _given(name):
            raise click.UsageError(f"--{name} is for the list: leave out RID")
    if rid is None and choice is not None:
        raise click.UsageError("--choice is of a request: give RID")
    with connect(conf, timeout, overrides) as client:
        if rid is not None:
            _explain(client, rid, choice, as_json, perfetto)
        else:
            _list(client, as_json, perfetto, **selection)


def _given(name: str) -> bool:
    """Whether the command line has this option."""
    return click.get_current_context().get_parameter_source(name) is not click.core.ParameterSource.DEFAULT


def _named(rid: str, choice: int | None = None) -> tuple[str, int]:
    """The request and the choice that an id means; `choice`: another one of the same request."""
    rid = rid_of(rid)
    found = _CHOICE.fullmatch(rid)
    request, index = (found[1], int(found[2])) if found else (rid, 0)
    return request, index if choice is None else choice


def _explain(client: Any, rid: str, choice: int | None, as_json: bool, perfetto: Path | None) -> None:
    from tetri.client import RequestRefused

    try:
        found = client.explain(*_named(rid, choice))
    except RequestRefused as error:
        raise RequestRefused(f"{error}. Only the last requests are kept: tetri-cli explain lists them") from None
    came, timeline = time.monotonic(), msgspec.convert(found, Timeline)
    if as_json:
        terminal.print_json(found)
    else:
        from tetri.cli.waterfall import drawn

        console = _console()
        console.print(drawn(timeline, console.width, console.options.ascii_only))
    _write(perfetto, [(came, timeline)])


def _list(client: Any, as_json: bool, perfetto: Path | None, slowest: bool, failed: bool, last: int) -> None:
    found = client.observe()["ended"]
    ended = [msgspec.convert(each, Ended) for each in found]
    chosen = [each for each in ended if each.reason in _FAILED or not failed]
    if slowest:
        chosen.sort(key=lambda each: each.jct_s)
    chosen = chosen[-last:]
    if as_json:
        terminal.print_json({"ended": msgspec.to_builtins(chosen)})
    elif chosen:
        click.echo(aligned([*_rows(chosen)]))
    else:
        click.echo("no request has ended" + (" by an error or its deadline" if failed and ended else " yet"))
    if perfetto is not None:
        _write(perfetto, [*_timelines(client, chosen)])


def _timelines(client: Any, ended: list[Ended]) -> Iterator[tuple[float, Timeline]]:
    """The Timelines of these requests, each with the time at which it came, as far as they are still kept."""
    from tetri.client import RequestRefused

    for each in ended:
        with contextlib.suppress(RequestRefused):
            found = client.explain(*_named(each.rid))
            yield time.monotonic(), msgspec.convert(found, Timeline)


def _rows(ended: list[Ended]) -> Iterator[list[str]]:
    yield [*_TITLES]
    for each in ended:
        times = (seconds(value) for value in (each.ttft_s, each.tpot_s, each.jct_s))
        counts = (str(value) for value in (each.attempts, each.prompt_tokens, each.outputs))
        where = f"{each.prefill or NOTHING} > {each.decode or NOTHING}"
        kept = each.slo_result or NOTHING
        yield [each.rid, f"{ago(each.age_s)} ago", each.reason, *times, kept, *counts, where]


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, markup=False)


def _write(perfetto: Path | None, timelines: list[tuple[float, Timeline]]) -> None:
    if perfetto is not None:
        from tetri.cli.perfetto import trace

        atomic.write_text(perfetto, json.dumps(trace(timelines)))
        terminal.tell(f"{perfetto}: a trace of {count(len(timelines), 'request')}; open it at ui.perfetto.dev")
