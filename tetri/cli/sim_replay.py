"""tetri-cli sim replay: replays the recorded events of a live cluster."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from tetri import terminal
from tetri.cli.options import examples, json_option


@click.command("replay", epilog=examples('tetri-cli sim replay "$XDG_RUNTIME_DIR/tetri"'))
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@json_option
def command(folder: Path, as_json: bool) -> int:
    """Feed the recorded events of a live cluster to fresh cores, and compare their actions.

    FOLDER is a run directory, or its `record` folder, of a cluster that was started with --set cluster.record=true.
    When an action differs, prints the first difference and exits with status 1.
    """
    from tetri.proc.recorder import RecordError
    from tetri.proc.replay import records, replay

    try:
        found = [replay(path) for path in records(folder)]
    except RecordError as error:
        raise click.UsageError(str(error)) from None
    differ = any(made.difference is not None for made in found)
    if as_json:
        sums = {name: sum(getattr(made, name) for made in found) for name in ("events", "ticks", "actions")}
        rows = [dataclasses.asdict(made) for made in found]
        terminal.print_json({"cores": rows, **sums, "same": not differ})
    else:
        for made in found:
            counts = f"{made.events} events, {made.ticks} ticks, {made.actions} actions"
            result = "same" if made.difference is None else f"DIFFERENT\n  {made.difference}"
            click.echo(f"{made.name}: {made.kind}, {counts}: {result}")
    return int(differ)
