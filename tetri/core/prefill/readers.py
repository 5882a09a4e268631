"""Which decode instances can read the KV of this prefill instance, and what to do about those that cannot.

As long as no chunk has landed, all KV of a request is still in the own slab. So a request whose KV one instance could
not read goes to another with the same slots, and keeps its attempt. It is given up here in three cases: a part of the
KV is at the instance that failed; the KV itself may be wrong; or another prefill instance may reach a decode
instance, and none can be reached from here. The next attempt avoids the instances that failed. Otherwise the request
waits for `patience_s`, while the breaker's probes find out whether the path is back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from random import Random

from tetri.core.instance.identity import Identity
from tetri.core.instance.peers import Peers
from tetri.core.prefill.decode_pool import LivePool
from tetri.core.prefill.request import PrefillRequest
from tetri.policy.breaker import FIRST_S, Breaker, Failing
from tetri.wire.handover import Refuse

LONGEST_S = 10.0  # the longest pause between two probes of a decode instance, up to twice as long by chance
_SHOWN = 3  # instances that an error names


class Readers:
    """The decode instances as readers of the own slab. `counters`: failed transfers by instance, for heartbeats."""

    def __init__(self, own: Identity, pool: LivePool, peers: Peers, rng: Random) -> None:
        self.own, self.pool, self.peers = own, pool, peers
        # Short enough for a path that is back to be found before the requests that wait for it run out of patience.
        self.breaker = Breaker(rng, max(FIRST_S, min(LONGEST_S, own.patience_s / 6)))
        self.counters: Counter[str] = Counter()

    def excluded(self, request: PrefillRequest, now: float) -> list[str]:
        """Return the instances that must not get the request now: those that the breaker blocks. If any other instance
        is large enough, also those that have failed this request or an earlier attempt of it, and then it is no probe
        either."""
        worse = dict.fromkeys([*request.flow.unread, *request.avoid])
        if worse:
            worse.update(dict.fromkeys(self.breaker.failing))
        return [*worse] if worse and self._others(request, worse) else self.breaker.blocked(now)

    def failed(self, request: PrefillRequest, refuse: Refuse, now: float) -> bool:
        """Record that the target of the request's offer could not read its KV. Return whether to give the request up
        here."""
        iid, flow, tried = request.flow.target, request.flow, request.flow.unread
        assert flow.offer is not None
        tried[iid] = None
        self.counters[f"unread_{iid}"] += 1
        self.breaker.failed(iid, flow.offer, refuse.why[:200], now)
        if not flow.movable:
            return True
        if refuse.corrupt and len(tried) > 1:  # wrong for several readers: the fault is here, and not theirs
            for reader in tried:
                self.breaker.succeeded(reader)
            return True
        if refuse.corrupt and not self._others(request, tried):
            return iid not in request.avoid  # computed again once; if that is wrong too, it is the reader
        return len(tried) > 1 and self._elsewhere(request)

    def avoided(self, request: PrefillRequest) -> list[str]:
        """Return the instances that the next attempt should avoid: those that could not read the KV of this one, and
        this one unless a part could be read."""
        tried = request.flow.unread
        return [*tried, *[self.own.iid] * (bool(tried) and request.flow.movable)]

    def overdue(self, requests: Iterable[PrefillRequest], now: float) -> list[tuple[PrefillRequest, str, list[str]]]:
        """Return the unplaced requests that must not wait any longer for an instance that can read their KV, each with
        the reason, and what its next attempt should avoid: nothing if there should be none."""
        found: list[tuple[PrefillRequest, str, list[str]]] = []
        for request in requests:
            all_bad = self._all_bad(request) if request.unplaced else {}
            if not all_bad:
                continue
            waited = now - self._since(request, all_bad)
            names = "; ".join(f"{iid}: {each.why}" for iid, each in [*all_bad.items()][:_SHOWN])
            if waited > self.own.patience_s:
                why = f"no decode instance could read KV of {self.own.iid} for {self.own.patience_s:.3g} s ({names})"
                found.append((request, why, []))
            elif waited > self.own.view_s and not self._theirs(all_bad) and self._elsewhere(request):
                found.append((request, f"no decode instance can read KV of {self.own.iid} ({names})", [self.own.iid]))
        return found

    def _since(self, request: PrefillRequest, failing: dict[str, Failing]) -> float:
        """Since when nobody can read its KV: since all of them fail, or since its first offer, if all have tried: it
        takes long to find a path silent."""
        since = max(request.queued.since, *(each.since for each in failing.values()))
        if request.wanted_at is not None and all(iid in request.flow.unread for iid in failing):
            return min(since, request.wanted_at)
        return since

    def _all_bad(self, request: PrefillRequest) -> dict[str, Failing]:
        """Return all instances that are large enough for the request, if each of them fails; else nothing."""
        fitting, failing = self.pool.fitting(request), self.breaker.failing
        return {iid: failing[iid] for iid in fitting} if all(iid in failing for iid in fitting) else {}

    def _theirs(self, failing: dict[str, Failing]) -> bool:
        """Whether each of them can read nobody's KV, so that another prefill instance would not help."""
        return all(each.warned for each in failing.values())

    def _elsewhere(self, request: PrefillRequest) -> bool:
        return self.peers.prefills(request.goal, request.avoid)

    def _others(self, request: PrefillRequest, without: dict[str, None]) -> bool:
        """Whether another instance is large enough for the request, whatever its load."""
        return any(iid not in without for iid in self.pool.fitting(request))
