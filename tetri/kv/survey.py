"""Lists the segments in shared memory from outside: owner, whether it lives, and owner and age of each used slot. Only
reads. A segment that changes meanwhile may be reported in its old or its new state. Segments that have lost their name
are found where their owners have them open."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from tetri.kv.base import KVLost
from tetri.kv.lease import owned
from tetri.kv.segment import Header, Mapping, look_at, read_only, remove_dead
from tetri.kv.shm import DIRECTORY
from tetri.kv.slab import MARK, Segment
from tetri.kv.unnamed import reopen, unnamed

_NAME = re.compile(r"tetri-([A-Za-z0-9._-]+)-([0-9a-f]{16})")


@dataclass(frozen=True, slots=True)
class Page:
    """A used slot: its owner (key of the engine request, cut to OWNER_BYTES), generation, and age in seconds."""

    slot: int
    owner: str
    generation: int
    age_s: float


@dataclass(frozen=True, slots=True)
class Seen:
    """One segment of `size` bytes. When the header cannot be read, `problem` says why, and the header's fields are
    empty or 0. `unlinked`: the file has no name any more, while its owner lives."""

    name: str
    deployment: str
    iid: str
    alive: bool
    size: int
    pid: int = 0
    slots: int = 0
    block_bytes: int = 0
    age_s: float = 0.0
    pages: tuple[Page, ...] = ()
    problem: str = ""
    unlinked: bool = False

    @property
    def oldest_s(self) -> float:
        """Age of the oldest used slot in seconds, 0.0 when none is used."""
        return max((page.age_s for page in self.pages), default=0.0)


def survey(deployment: str | None = None, directory: str = DIRECTORY) -> list[Seen]:
    """The segments of a deployment, or of all deployments of this user, sorted by name."""
    found = [_seen(directory, name) for name in os.listdir(directory) if _NAME.fullmatch(name)]
    of_it = [seen for seen in (*found, *_unlinked(directory)) if seen is not None and _of(deployment, seen)]
    return sorted(of_it, key=lambda seen: seen.name)


def _unlinked(directory: str) -> Iterator[Seen]:
    """The segments of living owners that have lost their name."""
    known = set()
    for process in Path("/proc").glob("[0-9]*"):
        for path in unnamed(int(process.name)):
            folder, name = os.path.split(path)
            if folder != directory or name in known or not _NAME.fullmatch(name):
                continue
            known.add(name)
            descriptor = reopen(int(process.name), name)
            seen = None if descriptor is None else _described_file(descriptor, name)
            if seen is not None and seen.alive:  # the memory of a dead owner's goes with its last reader
                yield replace(seen, unlinked=True)


def remove(seen: Seen, directory: str = DIRECTORY) -> bool:
    """Remove a segment whose owner is dead. False: the owner lives, or the segment is gone."""
    return remove_dead(directory, seen.name)


def _of(deployment: str | None, seen: Seen) -> bool:
    if deployment is None:
        return True
    if seen.deployment:
        return seen.deployment == deployment
    return seen.name.startswith(f"tetri-{deployment}-")


def _seen(directory: str, name: str) -> Seen | None:
    """Describe one file; None when it is gone or another user's."""
    try:
        descriptor = look_at(directory, name)
    except KVLost:
        return None
    return _described_file(descriptor, name)


def _described_file(descriptor: int, name: str) -> Seen:
    """Describe an open file, and close it."""
    try:
        alive, size = owned(descriptor), os.fstat(descriptor).st_size
        try:
            header, mapping = read_only(descriptor, name)
        except KVLost as error:
            problem = str(error).removeprefix(f"{name}: ")
            return Seen(name, "", "", alive, size, problem=problem)
        return _described(name, alive, size, header, mapping)
    finally:
        os.close(descriptor)


def _described(name: str, alive: bool, size: int, header: Header, mapping: Mapping) -> Seen:
    now = time.monotonic_ns()
    with closing(mapping):
        pages = _pages(mapping.segment, now)
    labels = name.removeprefix("tetri-")[: -len("-0123456789abcdef")]
    return Seen(
        name=name,
        deployment=labels[: header.deployment_bytes],
        iid=labels[header.deployment_bytes + 1 :],
        alive=alive,
        size=size,
        pid=header.pid,
        slots=header.slots,
        block_bytes=header.block_bytes,
        age_s=_seconds(now - header.made),
        pages=pages,
    )


def _pages(segment: Segment, now: int) -> tuple[Page, ...]:
    cells = (MARK.unpack_from(segment.marks, slot * MARK.size) for slot in range(segment.slots))
    return tuple(
        Page(slot, owner.rstrip(b"\0").decode(errors="ignore"), segment.generations[slot], _seconds(now - since))
        for slot, (since, owner) in enumerate(cells)
        if since
    )


def _seconds(nanoseconds: int) -> float:
    return max(nanoseconds, 0) / 1e9
