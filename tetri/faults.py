"""What goes wrong on purpose where KV moves, for rehearsals and tests: which faults, how often, and by chance from one
seed. Nothing does unless a configuration asks for it (`transfer.faults`)."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

_NUMBER = re.compile(r"\d{1,9}(\.\d{1,9})?")
_EXAMPLE = "drop=0.01,flip=0.01,seed=1"


class FaultsError(ValueError):
    """Not a list of faults; one line that says what is allowed."""


@dataclass(frozen=True, slots=True)
class Faults:
    """Chances from 0 to 1. The first five are those of each message of a hand-over (Offer, Grant, Refuse, Chunk,
    Landed, Drop), the next four those of each chunk that is taken, `spoil` that of each chunk that is put, and `die`
    that of each of a worker's moments in the middle of one."""

    drop: float = 0.0  # it never leaves
    duplicate: float = 0.0  # it leaves twice
    delay: float = 0.0  # it leaves up to `longest` seconds late
    reorder: float = 0.0  # the next one to the same peer overtakes it
    replay: float = 0.0  # an old message, of any attempt and offer, leaves once more beside it
    flip: float = 0.0  # one byte of what arrives is wrong; taken again, it is right
    truncate: float = 0.0  # the last blocks do not arrive; taken again, they do
    lose: float = 0.0  # it cannot be had
    late: float = 0.0  # it is taken up to `longest` seconds late
    spoil: float = 0.0  # one byte of the sender's own memory is wrong once the digest is made, and stays so
    die: float = 0.0  # the process kills itself
    longest: float = 0.2  # seconds
    seed: int = 0


KINDS = tuple(f.name for f in dataclasses.fields(Faults) if f.name not in ("longest", "seed"))


def parse_faults(text: str) -> Faults | None:
    """`name=number` of every fault that is wanted, joined by commas; None for "". Raises FaultsError."""
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


class Chance:
    """One process's dice. `counts` has every kind that can happen, from 0 on. `who` makes the dice of two processes,
    and of two lives of one, fall differently."""

    def __init__(self, faults: Faults, who: str) -> None:
        self.faults = faults
        self.rng = Random(f"{faults.seed} {who}")
        self._distribution = {kind: getattr(faults, kind) for kind in KINDS}
        self.counts: Counter[str] = Counter(
            {kind: 0 for kind, distribution in self._distribution.items() if distribution}
        )

    def happens(self, kind: str) -> bool:
        """Cast them. What happens is counted."""
        distribution = self._distribution[kind]
        if not distribution or self.rng.random() >= distribution:
            return False
        self.counts[kind] += 1
        return True

    def seconds(self) -> float:
        """How late something is."""
        return self.rng.uniform(0.0, self.faults.longest)

    def counters(self) -> dict[str, int]:
        return {f"injected_{kind}": count for kind, count in self.counts.items()}
