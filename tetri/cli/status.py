"""tetri-cli status: shows workers, monitor and requests."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import click
import msgspec

from tetri import terminal
from tetri.cli import columns as shown
from tetri.cli.columns import aligned, cells, counted, meanings
from tetri.cli.options import (
    Overrides,
    connect,
    deployment_options,
    examples,
    json_option,
    run_dir_of,
    seconds_option,
)
from tetri.cli.units import limits, share
from tetri.core.broker.notes import MONITOR_SILENT_S, NO_MONITOR
from tetri.wire.clients import InstanceStatus, MonitorStatus, Status

_COLUMNS = (
    *(shown.INSTANCE, shown.ROLE, shown.STATE, shown.QUEUED, shown.QUEUE_TIME, shown.FILL, shown.WAITING),
    *(shown.RUNNING, shown.HEAVY, shown.BATCH, shown.BLOCKS, shown.KV_USED, shown.BUSY, shown.HELD, shown.RATIO),
    *(shown.KV, shown.NOTE),
)
_LENGTHS = ["lengths by", "kind", "state", "predicted", "late", "ended", "right", "of the prior", "below end", "note"]


@click.command("status", epilog=examples("tetri-cli status", "tetri-cli status --json"))
@deployment_options
@seconds_option("--timeout", default=5.0)
@json_option
def command(conf: Path | None, overrides: Overrides, timeout: float, as_json: bool) -> None:
    """Show the workers, the monitor, and the number of requests in each stage.

    `fill` and `batch` are means since the worker started; `tetri-cli top` shows those of the last seconds."""
    with connect(conf, timeout, overrides) as client:
        found = client.status()
    gateways = _gateways(conf, overrides)
    if as_json:
        terminal.print_json({**found, "gateways": gateways})
        return
    status = msgspec.convert(found, Status)
    click.echo(f"model     {status.model}")
    click.echo(f"monitor   {monitor(status.monitor)}")
    click.echo(f"requests  {counted(status.requests)}")
    click.echo(f"counted   {counted(status.counters)}")
    click.echo(f"limits    {limits(status.slo)}   {_kept(status.slo_requests)}")
    for report in gateways.values():
        click.echo(f"gateway   {report['url']}/v1: {_answers(report)}")
    rows = [cells(_COLUMNS, instance) for instance in status.instances]
    click.echo(aligned([[column.title for column in _COLUMNS], *rows]))
    if fetched := _kv(status.instances):
        click.echo(aligned([["counted by", "events"], *fetched]))
    if lengths := _lengths(status.instances):
        click.echo(aligned([_LENGTHS, *lengths]))
    for note in status.notes:
        click.echo(f"degraded  {note}")


command.help = f"{inspect.cleandoc(command.help or '')}\n\n{meanings(_COLUMNS)}"


def monitor(found: MonitorStatus | None) -> str:
    """State of the monitor, as the broker knows it from the last cluster view; when silent, with the consequences."""
    if found is None:
        return f"silent since the broker's start: {NO_MONITOR}"
    if found.age_s >= MONITOR_SILENT_S:
        return f"silent for {found.age_s:.1f} s: {NO_MONITOR}"
    return f"view {found.number}, {found.age_s:.1f} s old, flip policy {found.flip}"


def _kept(results: dict[str, int]) -> str:
    """How requests kept their limits of latency, since the broker's start."""
    met, total = results.get("met", 0), sum(results.values())
    missed = counted({name: count for name, count in results.items() if count and name != "met"}, "")
    return f"kept by {met} of {total} ({share(met, total)})" + (f"; missed: {missed}" if missed else "")


def _gateways(conf: Path | None, overrides: Overrides) -> dict[str, dict[str, Any]]:
    """What the HTTP gateways of the deployment report, by their names."""
    from tetri.proc import gateways

    return gateways.read(run_dir_of(conf, overrides))


def _answers(report: dict[str, Any]) -> str:
    """What an HTTP gateway has counted."""
    parts = [f"{report['open']} open", *(f"{count} answered {status}" for status, count in report["answered"].items())]
    ignored = [f"ignored {counted(report['ignored'])}"] if report["ignored"] else []
    return "; ".join([", ".join(parts), *ignored])


def _kv(instances: list[InstanceStatus]) -> list[list[str]]:
    """Rows of (iid, counters of its KV receives and sockets); none for an instance whose counters are all 0."""
    found = [(each.iid, {name: n for name, n in each.counters.items() if n}) for each in instances]
    return [[iid, counted(counters)] for iid, counters in found if counters]


def _lengths(instances: list[InstanceStatus]) -> list[list[str]]:
    """Rows about length predictors; a decode instance has one only after it has predicted."""
    rows: list[list[str]] = []
    for each in instances:
        found = each.predictor
        if found is None or (each.role == "decode" and not found.predicted):
            continue
        state = "on" if found.on else "-" if found.kind == "prior" else "off"
        counts = [str(count) for count in (found.predicted, found.late, found.scored)]
        shares = [share(part, found.scored) for part in (found.right, found.prior_right, found.inside)]
        short = [f"{n} prompts {name}" for name, n in (("cut", found.cut), ("unread", found.unread)) if n]
        note = "; ".join(filter(None, [found.note, *short]))
        rows.append([each.iid, found.kind, state, *counts, *shares, note])
    return rows
