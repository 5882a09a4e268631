"""tetri-cli status: shows workers, monitor and requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tetri import terminal
from tetri.cli.options import Overrides, connect, deployment_options, json_option, run_dir_of, seconds_option
from tetri.core.broker.notes import MONITOR_SILENT_S, NO_MONITOR

_COLUMNS = ("iid", "role", "state", "blocks", "free_blocks", "queued", "running", "held", "step_ratio", "kv", "note")
_LENGTHS = ["lengths by", "kind", "state", "predicted", "late", "ended", "right", "of the prior", "below end", "note"]


@click.command("status")
@deployment_options
@seconds_option("--timeout", default=5.0)
@json_option
def command(conf: Path | None, overrides: Overrides, timeout: float, as_json: bool) -> None:
    """Show the workers, the monitor, and the number of requests in each stage."""
    with connect(conf, timeout, overrides) as client:
        status = client.status()
    gateways = _gateways(conf, overrides)
    if as_json:
        terminal.print_json({**status, "gateways": gateways})
        return
    click.echo(f"model     {status['model']}")
    click.echo(f"monitor   {_monitor(status.get('monitor'))}")
    click.echo(f"requests  {_counts(status['requests'])}")
    click.echo(f"counted   {_counts(status['counters'])}")
    for report in gateways.values():
        click.echo(f"gateway   {report['url']}/v1: {_answers(report)}")
    instances = [{**each, **each["load"], **_texts(each)} for each in status["instances"]]
    rows = [[str(instance.get(name, "")) for name in _COLUMNS] for instance in instances]
    click.echo(_aligned([[name.replace("_", " ") for name in _COLUMNS], *rows]))
    if fetched := _kv(instances):
        click.echo(_aligned([["counted by", "events"], *fetched]))
    if lengths := _lengths(instances):
        click.echo(_aligned([_LENGTHS, *lengths]))
    for note in status["notes"]:
        click.echo(f"degraded  {note}")


def _monitor(found: dict[str, Any] | None) -> str:
    """State of the monitor, as the broker knows it from the last cluster view; when silent, with the consequences."""
    if found is None:
        return f"silent since the broker's start: {NO_MONITOR}"
    if found["age_s"] >= MONITOR_SILENT_S:
        return f"silent for {found['age_s']:.1f} s: {NO_MONITOR}"
    return f"view {found['number']}, {found['age_s']:.1f} s old, flip policy {found['flip']}"


def _gateways(conf: Path | None, overrides: Overrides) -> dict[str, dict[str, Any]]:
    """What the HTTP gateways of the deployment report, by their names."""
    from tetri.proc import gateways

    return gateways.read(run_dir_of(conf, overrides))


def _answers(report: dict[str, Any]) -> str:
    """What an HTTP gateway has counted."""
    parts = [f"{report['open']} open", *(f"{count} answered {status}" for status, count in report["answered"].items())]
    ignored = [f"ignored {_counts(report['ignored'])}"] if report["ignored"] else []
    return "; ".join([", ".join(parts), *ignored])


def _texts(instance: dict[str, Any]) -> dict[str, str]:
    """The cells of an instance whose values are mappings. Phases of which too few steps were compared are left out."""
    ratios = instance.get("step_ratio", {})
    shown = {phase: f"{ratio:.2f}" for phase, ratio in ratios.items() if ratio is not None}
    return {"kv": _counts(instance.get("paths", {}), ""), "step_ratio": _counts(shown, "")}


def _kv(instances: list[dict[str, Any]]) -> list[list[str]]:
    """Rows of (iid, counters of its KV receives and sockets); none for an instance whose counters are all 0."""
    found = [(each["iid"], {name: n for name, n in each.get("counters", {}).items() if n}) for each in instances]
    return [[iid, _counts(counters)] for iid, counters in found if counters]


def _lengths(instances: list[dict[str, Any]]) -> list[list[str]]:
    """Rows about length predictors; a decode instance has one only after it has predicted."""
    rows: list[list[str]] = []
    for each in instances:
        found = each.get("predictor")
        if found is None or (each["role"] == "decode" and not found["predicted"]):
            continue
        state = "on" if found["on"] else "-" if found["kind"] == "prior" else "off"
        counts = [str(found[name]) for name in ("predicted", "late", "scored")]
        shares = [_share(found[name], found["scored"]) for name in ("right", "prior_right", "inside")]
        short = [f"{found[name]} prompts {name}" for name in ("cut", "unread") if found[name]]
        note = "; ".join(filter(None, [found["note"], *short]))
        rows.append([each["iid"], found["kind"], state, *counts, *shares, note])
    return rows


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "-"


def _counts(counts: dict[str, Any], nothing: str = "none") -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or nothing


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
