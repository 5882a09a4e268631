"""torture: bring about the faults that once stopped a deployment, gave wrong answers or spread in it, one by one.

    tools/torture                      # all cases, less than five minutes on two cores
    tools/torture --case frozen --case descriptors --json

Each case runs deployments of its own with emulated engines, in run directories of their own, and removes them also
after Ctrl-C. Exit status 0: all limits of all cases are kept."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click

from tetri.bench.report import Program, as_json, give, progress, table
from tetri.bench.torture import assigns, connections, frozen, membership, mixed, paths, poison, slow_reader, texts
from tetri.bench.torture.case import Case, judged

CASES = (
    Case("descriptors", "2,000 connects to a broker with 256 descriptors", connections.descriptors),
    Case("texts", "60 Submits of megabytes at once", texts.texts),
    Case("stopped-reader", "a client with 1,000 open streams stops reading", slow_reader.stopped_reader),
    Case("client-cost", "1,000 open streams of one client", slow_reader.client_cost),
    Case("assigns", "4,000 requests for a worker with steps of 0.5 s", assigns.assigns),
    Case("membership", "256 workers start, and half of them are lost", membership.membership),
    Case("mixed", "messages fail, and each engine writes other tokens", mixed.mixed),
    Case("poison", "a request that kills its workers", poison.poison),
    Case("unreadable", "one of two decode instances cannot read KV", paths.unreadable),
    Case("cut-path", "no decode instance can read KV for a while", paths.cut_path),
    Case("unlinked", "the files of all segments are removed", paths.unlinked),
    Case("frozen", "each process stops for three times dead_s, then all", frozen.frozen),
)
NAMES = [case.name for case in CASES]


def listed() -> str:
    """The names of all cases, with their faults."""
    return table(("case", "fault"), [[case.name, case.about] for case in CASES])


def measured(names: Sequence[str]) -> dict[str, Any]:
    """Run these cases one after another."""
    found = []
    for case in CASES:
        if case.name in names:
            progress(f"{case.name}: {case.about}")
            found.append(judged(case))
    return {"cases": found, "ok": all(each["ok"] for each in found)}


def shown(run: dict[str, Any]) -> str:
    """Format the results as a table, one row for each figure."""
    rows = []
    for case in run["cases"]:
        verdict = "ok" if case["ok"] else "NOT OK"
        for name, value in case["figures"].items():
            rows.append([case["name"], verdict, name, _text(value), case["limits"].get(name, "")])
            case, verdict = {**case, "name": ""}, ""
    lines = [table(("case", "", "figure", "value", "limit"), rows)]
    broken = [f"{case['name']}: {line}" for case in run["cases"] for line in case["broken"]]
    good = sum(case["ok"] for case in run["cases"])
    return "\n".join([*lines, *broken, f"{good} of {len(run['cases'])} cases are ok"])


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(each)}" for name, each in value.items()) or "none"
    if isinstance(value, list):
        return "; ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


@click.command(cls=Program)
@click.option("--case", "names", multiple=True, type=click.Choice(NAMES), help="Run only this one; may be repeated.")
@click.option("--list", "only_list", is_flag=True, help="List the cases and exit.")
@as_json
def main(names: tuple[str, ...], only_list: bool, as_json: bool) -> None:
    """Bring about one hard fault after another, and measure what it does to everybody else."""
    if only_list:
        give({"cases": [{"name": case.name, "about": case.about} for case in CASES]}, listed(), as_json)
        return
    run = measured(names or NAMES)
    give(run, shown(run), as_json)
    sys.exit(0 if run["ok"] else 1)


if __name__ == "__main__":
    main(prog_name="torture")
