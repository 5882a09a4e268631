"""Fault injection in the KV hand-over, for rehearsals and tests: the faults, their probabilities and the random
choice, and the cuts. It is off unless the configuration sets `transfer.faults` or `transfer.cuts`."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf
from random import Random

_NUMBER = re.compile(r"\d{1,9}(\.\d{1,9})?")
_EXAMPLE = "drop=0.01,flip=0.01,seed=1"


class FaultsError(ValueError):
    """A text is not a valid list of faults; one line that states what is allowed."""


@dataclass(frozen=True, slots=True)
class Faults:
    """Probabilities from 0 to 1. `drop` to `replay` apply to each message of a hand-over (Offer, Grant, Defer, Refuse,
    Chunk, Landed, Drop), `flip` to `late` to each fetch of a KV chunk, `spoil` to each KV chunk that is put into the
    slab, `die` to each step of a hand-over."""

    drop: float = 0.0  # the message is not sent
    duplicate: float = 0.0  # the message is sent twice
    delay: float = 0.0  # the message is sent up to `longest` seconds late
    reorder: float = 0.0  # the next message to the same peer is sent before it
    replay: float = 0.0  # an old message, of any attempt and offer, is sent in addition
    flip: float = 0.0  # one byte arrives wrong; a second fetch is right
    truncate: float = 0.0  # the last blocks do not arrive; a second fetch is complete
    lose: float = 0.0  # the fetch fails
    late: float = 0.0  # the fetch takes up to `longest` seconds longer
    spoil: float = 0.0  # one byte in the sender's slab changes after the digest was computed, and stays wrong
    die: float = 0.0  # the process kills itself
    longest: float = 0.2  # seconds
    seed: int = 0


KINDS = tuple(f.name for f in dataclasses.fields(Faults) if f.name not in ("longest", "seed"))


def parse_faults(text: str) -> Faults | None:
    """Parse `name=number` items, separated by commas; None for an empty text. Raises FaultsError."""
    if not text.strip():
        return None
    found: dict[str, float] = {}
    for name, number in parsed_pairs(text, [f.name for f in dataclasses.fields(Faults)], _EXAMPLE):
        if name == "seed" and "." in number:
            raise FaultsError(f"seed must be a whole number, got {number}")
        found[name] = float(number)
        if name in KINDS and found[name] > 1:
            raise FaultsError(f"{name} must be from 0 to 1, got {number}")
    if found.get("longest", 0.0) > 60:
        raise FaultsError("longest must be at most 60 seconds")
    if not any(found.get(kind) for kind in KINDS):
        raise FaultsError(f'nothing would go wrong: give a fault a chance above 0, as in {_EXAMPLE}, or write ""')
    seed = int(found.pop("seed", 0))
    return Faults(**found, seed=seed)


def parsed_pairs(text: str, known: Sequence[str], example: str) -> Iterator[tuple[str, str]]:
    """Each name, one of the known ones, with its plain number, from "name=number,name=number". Raises FaultsError."""
    seen: set[str] = set()
    for part in text.split(","):
        name, equals, number = (piece.strip() for piece in part.partition("="))
        if name in known and not equals:
            raise FaultsError(f"{name} needs a number, as in {example}")
        if name not in known:
            raise FaultsError(f"{part.strip()[:40]!r} is no fault: use {', '.join(known)}, as in {example}")
        if name in seen:
            raise FaultsError(f"{name} is given twice")
        if not _NUMBER.fullmatch(number):
            raise FaultsError(f"{name} must be a plain number, got {number[:40]!r}")
        seen.add(name)
        yield name, number


_CUT = re.compile(r"(flip:)?(?:(\w+)>)?(\w+)(?:@(file|(\d{1,9}(?:\.\d{1,9})?)-(\d{1,9}(?:\.\d{1,9})?)))?", re.ASCII)
_CUTS = 'write READER or SENDER>READER, then @FROM-TO in seconds or @file if it is not for ever, as in "d1, p0>d0@5-20"'


@dataclass(frozen=True, slots=True)
class Cut:
    """A fault for a while: the KV that `reader` fetches from `sender` ("": from any instance) cannot be read, or with
    `flips` is wrong. Messages pass. It lasts from `start` to `stop` seconds, or with `by_file` while a file exists."""

    reader: str
    sender: str = ""
    flips: bool = False
    start: float = 0.0
    stop: float = inf
    by_file: bool = False

    def applies(self, reader: str, sender: str, now: float, file: bool = False) -> bool:
        """Whether a fetch fails now. `file`: whether the file exists."""
        if self.reader != reader or self.sender not in ("", sender):
            return False
        return file if self.by_file else self.start <= now < self.stop


def parse_cuts(text: str) -> tuple[Cut, ...]:
    """Parse cuts, separated by commas: "d1" (whatever d1 fetches cannot be read), "p0>d1" (what it fetches from p0),
    "flip:d1" (what it fetches is wrong), "d1@5-20" (from 5 to 20 seconds), "d1@file". Raises FaultsError."""
    cuts = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        found = _CUT.fullmatch(part)
        if found is None:
            raise FaultsError(f"{part[:40]!r} is no cut: {_CUTS}")
        flips, sender, reader, when, start, stop = found.groups()
        cut = Cut(reader, sender or "", bool(flips), float(start or 0), float(stop or inf), when == "file")
        if not cut.start < cut.stop:
            raise FaultsError(f"{part[:40]!r} ends before it begins: {_CUTS}")
        cuts.append(cut)
    return tuple(cuts)


class Chance:
    """The random choices of one process. `counts`: number of injected faults of every kind with a probability above 0.
    `who` is part of the seed, so that processes, and two starts of one, choose differently."""

    def __init__(self, faults: Faults, who: str) -> None:
        self.faults = faults
        self.rng = Random(f"{faults.seed} {who}")
        self._chances = {kind: getattr(faults, kind) for kind in KINDS}
        self.counts: Counter[str] = Counter({kind: 0 for kind, chance in self._chances.items() if chance})

    def happens(self, kind: str) -> bool:
        """Choose whether this fault is injected now, and count it if it is."""
        chance = self._chances[kind]
        if not chance or self.rng.random() >= chance:
            return False
        self.counts[kind] += 1
        return True

    def seconds(self) -> float:
        """A random delay in seconds, up to `longest`."""
        return self.rng.uniform(0.0, self.faults.longest)

    def counters(self) -> dict[str, int]:
        """The counts as counters of a heartbeat: injected_KIND."""
        return {f"injected_{kind}": count for kind, count in self.counts.items()}
