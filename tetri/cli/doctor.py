"""tetri-cli doctor: finds leaked shared memory and dead sockets on this host."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tetri import private, terminal
from tetri.cli.options import Overrides, deployment_options, examples, json_option, seconds_option

if TYPE_CHECKING:
    from tetri.kv.survey import Seen

KEEP = "To keep such files, run loginctl enable-linger, or set RemoveIPC=no in /etc/systemd/logind.conf"
LEAK_S = 60.0  # a slot is used until its chunk has landed: for milliseconds, or until a decode worker has memory
_SHOWN = 16  # used slots of a segment that are shown without --pages


@click.command(
    "doctor",
    epilog=examples(
        "tetri-cli doctor",
        "tetri-cli doctor --all --sweep   # removes what dead workers left",
    ),
)
@deployment_options
@click.option("--all", "everything", is_flag=True, help="Check all deployments of this user.")
@click.option("--sweep", is_flag=True, help="Remove the segments of dead workers.")
@click.option("--pages", is_flag=True, help=f"Show every used slot, not only the {_SHOWN} oldest of each segment.")
@seconds_option("--leak-s", default=LEAK_S, help="Report slots that are used for longer.")
@json_option
def command(
    conf: Path | None, overrides: Overrides, everything: bool, sweep: bool, pages: bool, leak_s: float, as_json: bool
) -> int:
    """Find problems on this host: KV slabs of dead workers, slots that are not freed, dead sockets.

    Reads shared memory and the run directory only, so it also works when processes are dead or stuck. Exit status 1
    when there is a problem."""
    from tetri.config import load
    from tetri.kv.survey import remove, survey

    config = load(_configuration(conf, overrides), overrides)
    deployment = None if everything else config.cluster.name
    segments = survey(deployment)
    removed = [seen.name for seen in segments if not seen.alive and remove(seen)] if sweep else []
    segments = [seen for seen in segments if seen.name not in removed]
    sockets = _sockets(config.run_dir)
    same = [*(["--conf", str(conf)] if conf else []), *(part for each in overrides for part in ("--set", each))]
    sweeping = shlex.join(["tetri-cli", "doctor", *same, *(["--all"] if everything else []), "--sweep"])
    wrong = [*_problems(segments, leak_s, sweeping), *(_dead_socket(path) for path, alive in sockets if not alive)]
    found = Found(deployment, segments, sockets, removed, wrong)
    if as_json:
        terminal.print_json(_record(found))
    else:
        click.echo("\n".join(_report(found, None if pages else _SHOWN)))
    return 1 if wrong else 0


@dataclasses.dataclass(frozen=True)
class Found:
    """What the check found. `deployment`: None for all; `sockets`: (path, whether a process listens)."""

    deployment: str | None
    segments: Sequence[Seen]
    sockets: Sequence[tuple[str, bool]]
    removed: Sequence[str]
    problems: Sequence[str]


def _configuration(conf: Path | None, overrides: Sequence[str]) -> str | Path:
    """The configuration that is given, else that of the last `up` in the default run directory."""
    from tetri.config import default_path, default_run_dir
    from tetri.proc.launch import CONF

    named = conf or os.environ.get("TETRI_CONF")
    started = default_run_dir() / CONF
    if not named and not overrides and started.is_file():
        private.check_folder(started.parent)
        return started
    return named or default_path()


def _sockets(run_dir: Path) -> list[tuple[str, bool]]:
    """(path, whether a process listens) of each socket in the run directory. Raises PrivateError."""
    from tetri.net.address import refuse_live_owner
    from tetri.net.errors import NetError

    if not run_dir.is_dir():
        return []
    private.check_folder(run_dir)
    found = []
    for path in sorted(run_dir.iterdir()):
        with contextlib.suppress(FileNotFoundError):  # its process has just ended
            if stat.S_ISSOCK(path.lstat().st_mode):
                try:
                    refuse_live_owner(str(path))
                    found.append((str(path), False))
                except NetError:
                    found.append((str(path), True))
    return found


def _problems(segments: Sequence[Seen], leak_s: float, sweeping: str) -> Iterator[str]:
    for seen in segments:
        if not seen.alive:
            owner = f"{seen.iid} (process {seen.pid})" if seen.iid else "its owner"
            yield f"{seen.name}: {owner} is dead and left {_mb(seen.size)}: {sweeping} removes it"
        elif seen.unlinked:
            yield (
                f"{seen.name}: was removed from /dev/shm while {seen.iid} (process {seen.pid}) runs, by hand or by"
                f" systemd-logind when the user logged out. {seen.iid} serves on, but not to workers in other PID"
                f" namespaces. {KEEP}; then restart {seen.iid}"
            )
        elif seen.problem:
            yield f"{seen.name}: {seen.problem}: its owner is starting, or runs another version of tetri"
        elif seen.oldest_s > leak_s:
            old = [page for page in seen.pages if page.age_s > leak_s]
            owners = sorted({page.owner or "?" for page in old})
            yield (
                f"{seen.name}: {len(old)} slots of {seen.iid} (process {seen.pid}) are used for more than {leak_s:g} s,"
                f" the oldest for {seen.oldest_s:.0f} s, by {_some(owners)}: lost, or waiting for decode workers"
            )


def _dead_socket(path: str) -> str:
    return f"{path}: nobody listens: its process is dead; start it again or remove the file"


def _record(found: Found) -> dict[str, Any]:
    rows = []
    for seen in found.segments:
        fields = dataclasses.asdict(seen)
        fields["instance"] = fields.pop("iid")
        rows.append({**fields, "used": len(seen.pages), "oldest_s": seen.oldest_s})
    sockets = [{"path": path, "alive": alive} for path, alive in found.sockets]
    return {**vars(found), "segments": rows, "sockets": sockets}


def _report(found: Found, most: int | None) -> Iterator[str]:
    for seen in found.segments:
        state = "alive" if seen.alive else "dead"
        used = f"{len(seen.pages)} of {seen.slots} slots used, the oldest for {seen.oldest_s:.3f} s"
        what = f"{seen.name}  {seen.iid or '?'}  process {seen.pid or '?'}  {state}  {_mb(seen.size)}"
        yield f"{what}  {seen.problem or used}"
        for page in sorted(seen.pages, key=lambda page: -page.age_s)[:most]:
            owner = page.owner or "?"
            yield f"    slot {page.slot:>5}  generation {page.generation:>6}  {page.age_s:>10.3f} s  {owner}"
        if most is not None and len(seen.pages) > most:
            yield f"    and {len(seen.pages) - most} more (--pages shows all)"
    yield from (f"{name}  removed" for name in found.removed)
    if found.sockets:
        yield f"sockets: {sum(alive for _, alive in found.sockets)} of {len(found.sockets)} are listened to"
    if not found.segments and not found.removed:
        yield "no segments"
    yield from (f"PROBLEM  {problem}" for problem in found.problems)
    if not found.problems:
        yield "nothing is wrong"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
