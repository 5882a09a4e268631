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
from tetri.core.decode.request import DecodeRequest

LONG_S = 5.0  # shorter waits are normal under load, and must not change the order
LOOK = 16  # how many offers are tried when memory becomes free


@dataclass(slots=True)
class Deferred:
    """A request on offer that has no memory here yet. `since`: when it was first on offer, here or elsewhere; `asked`:
    when its prefill instance last sent the offer. Times are seconds of the worker's clock. `since` is infinite for a
    canary."""

    request: DecodeRequest
    since: float
    asked: float


class DeferredOffers:
    """Deferred offers, those that have waited longest first, at most one of each request.

    None is added while they lack `limit` blocks. How many an offer needs does not count, otherwise small ones could
    keep a large one out for ever. One that its prefill instance has not repeated for `keep_s` seconds is forgotten: it
    has ended, or another instance has it."""

    def __init__(self, limit: int, keep_s: float) -> None:
        self.limit, self.keep_s = limit, keep_s
        self.blocks = 0
        self._by_rid: dict[str, Deferred] = {}

    def __len__(self) -> int:
        return len(self._by_rid)

    def __contains__(self, rid: str) -> bool:
        return rid in self._by_rid

    def __iter__(self) -> Iterator[DecodeRequest]:
        return (deferred.request for deferred in self._by_rid.values())

    def get(self, rid: str) -> DecodeRequest | None:
        """The request, if it is deferred."""
        return self._by_rid[rid].request if rid in self._by_rid else None

    def asked(self, request: DecodeRequest, now: float) -> None:
        """Record that the offer of a deferred request has arrived again."""
        self._by_rid[request.offer.rid].asked = now

    def enter(self, request: DecodeRequest, now: float, free: int) -> bool:
        """Defer a request, while `free` blocks can be granted. False: there are too many."""
        if self.blocks - free >= self.limit:
            return False
        since = inf if request.offer.canary else now - request.offer.waited_s
        behind = not self._by_rid or self._by_rid[next(reversed(self._by_rid))].since <= since
        self._by_rid[request.offer.rid] = Deferred(request, since, now)
        if not behind:
            self._by_rid = dict(sorted(self._by_rid.items(), key=lambda item: item[1].since))
        self.blocks += request.blocks
        return True

    def leave(self, rid: str) -> bool:
        """Remove a request that is granted, withdrawn or closed. False: it is not deferred."""
        deferred = self._by_rid.pop(rid, None)
        if deferred is None:
            return False
        self.blocks -= deferred.request.blocks
        return True

    def first(self, now: float) -> Iterator[DecodeRequest]:
        """Yield the requests to try, at most LOOK. The caller removes those that it grants. Ends with a request that
        has waited for LONG_S and was not granted: no other may overtake it."""
        for deferred in list(islice(self._by_rid.values(), LOOK)):
            if deferred.since == inf and next(iter(self._by_rid.values())).since < inf:
                return
            yield deferred.request
            if now - deferred.since >= LONG_S and deferred.request.offer.rid in self._by_rid:
                return

    def expired(self, now: float) -> list[DecodeRequest]:
        """The requests to forget."""
        return [each.request for each in self._by_rid.values() if now - each.asked > self.keep_s]

    def check(self) -> None:
        """Raise Broken when the sum of blocks is wrong."""
        if self.blocks != sum(each.request.blocks for each in self._by_rid.values()):
            raise Broken(f"{self.blocks} blocks are deferred, counted otherwise")
