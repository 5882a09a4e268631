"""The offers for which a decode instance has no memory yet.

A deferred offer stays, with the KV chunks that are announced for it, and is granted when memory becomes free: its
prefill instance need not ask again. Those that have waited longest come first. A smaller offer may be granted before
a larger one that does not fit, but not for long: otherwise small offers of several prefill instances could use all
memory that becomes free, and starve a large one. A canary comes last, and only when no other offer waits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from math import inf

from tetri.core.actions import Broken
from tetri.core.decode.request import HandOver

LONG_S = 5.0  # shorter waits are normal under load, and must not change the order
LOOK = 16  # how many offers are tried when memory becomes free


@dataclass(slots=True)
class Deferred:
    """A hand-over that has no memory here yet. `since`: when it was first on offer, here or elsewhere; `asked`: when
    its prefill instance last sent the offer. Times are seconds of the worker's clock. `since` is infinite for a
    canary."""

    hand_over: HandOver
    since: float
    asked: float


class DeferredOffers:
    """Deferred offers, those that have waited longest first, none of whose choices has another.

    None is added while they lack `limit` blocks. How many an offer needs does not count, otherwise small ones could
    keep a large one out for ever. One that its prefill instance has not repeated for `keep_s` seconds is forgotten: it
    has ended, or another instance has it."""

    def __init__(self, limit: int, keep_s: float) -> None:
        self.limit, self.keep_s = limit, keep_s
        self.blocks = 0
        self._by_key: dict[str, Deferred] = {}

    def __len__(self) -> int:
        return len(self._by_key)

    def __contains__(self, key: str) -> bool:
        return key in self._by_key

    def __iter__(self) -> Iterator[HandOver]:
        return (deferred.hand_over for deferred in self._by_key.values())

    def asked(self, hand_over: HandOver, now: float) -> None:
        """Record that the offer of a deferred hand-over has arrived again."""
        self._by_key[hand_over.key].asked = now

    def enter(self, hand_over: HandOver, now: float, free: int) -> bool:
        """Defer a hand-over, while `free` blocks can be granted. False: there are too many."""
        if self.blocks - free >= self.limit:
            return False
        since = inf if hand_over.offer.canary else now - hand_over.offer.waited_s
        behind = not self._by_key or self._by_key[next(reversed(self._by_key))].since <= since
        self._by_key[hand_over.key] = Deferred(hand_over, since, now)
        if not behind:
            self._by_key = dict(sorted(self._by_key.items(), key=lambda item: item[1].since))
        self.blocks += hand_over.blocks
        return True

    def leave(self, hand_over: HandOver) -> None:
        """Remove a hand-over that is granted, or of which no choice is left."""
        del self._by_key[hand_over.key]
        self.blocks -= hand_over.blocks

    def shrink(self, blocks: int) -> None:
        """Count a choice of a deferred hand-over no longer, which needs so many blocks."""
        self.blocks -= blocks

    def first(self, now: float) -> Iterator[HandOver]:
        """Yield the hand-overs to try, at most LOOK. The caller removes those that it grants. Ends with one that has
        waited for LONG_S and was not granted: no other may overtake it."""
        for deferred in list(islice(self._by_key.values(), LOOK)):
            if deferred.since == inf and next(iter(self._by_key.values())).since < inf:
                return
            yield deferred.hand_over
            if now - deferred.since >= LONG_S and deferred.hand_over.key in self._by_key:
                return

    def expired(self, now: float) -> list[HandOver]:
        """The hand-overs to forget."""
        return [each.hand_over for each in self._by_key.values() if now - each.asked > self.keep_s]

    def check(self) -> None:
        """Raise Broken when the sum of blocks is wrong."""
        if self.blocks != sum(each.hand_over.blocks for each in self._by_key.values()):
            raise Broken(f"{self.blocks} blocks are deferred, counted otherwise")
