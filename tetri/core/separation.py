"""Which adaptive instances keep to prefill: the load of a window, and a decision that holds for some seconds."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from tetri.policy.keep import keep
from tetri.policy.views import ClusterLoad
from tetri.wire.load import Load

WINDOW_S = 60.0  # over which the load is measured
LEAST_S = 15.0  # of it that must have passed before the first decision
HOLD_S = 5.0  # least time between two changes
LONG = 1.6  # the prefill of a long prompt, over the mean
AIMED = 0.9  # share of a limit that is aimed at
LEAST_BESIDE = 0.05  # of a chunk's time that is beyond a decode step, where measured times say less


@dataclass(slots=True)
class _Totals:
    """Counts of all instances at one time."""

    at: float
    arrived: int = 0
    arrived_s: float = 0.0
    decodes: int = 0
    ended: int = 0
    ended_tokens: int = 0


class Separation:
    """Decides how far prefill and decode are apart. `kept`: the instances that keep to prefill."""

    def __init__(self) -> None:
        self.kept: dict[str, None] = {}
        self._seen: dict[str, Load] = {}
        self._totals = _Totals(0.0)
        self._window: deque[_Totals] = deque()
        self._changed_at = 0.0

    def look(self, loads: Mapping[str, Load], now: float) -> dict[str, str]:
        """Return what each of these instances keeps to, by the newest loads."""
        self._count(loads, now)
        kept = [iid for iid in self.kept if iid in loads]
        self.kept = dict.fromkeys(kept[: max(len(loads) - 1, 0)])  # others have gone: one at least decodes
        load = self._load(loads, now) if now - self._changed_at >= HOLD_S else None
        if load is not None:
            wanted = keep(load, len(self.kept))
            if wanted != len(self.kept):
                self._keep(wanted, loads)
                self._changed_at = now
        return dict.fromkeys(self.kept, "prefill")

    def _count(self, loads: Mapping[str, Load], now: float) -> None:
        totals = self._totals
        totals.at = now
        for iid, load in loads.items():
            before = self._seen.get(iid)
            if before is not None:
                totals.arrived += max(load.arrived - before.arrived, 0)
                totals.arrived_s += max(load.arrived_s - before.arrived_s, 0.0)
                totals.decodes += max(load.decodes - before.decodes, 0)
                totals.ended += max(load.ended - before.ended, 0)
                totals.ended_tokens += max(load.ended_tokens - before.ended_tokens, 0)
        self._seen = dict(loads)
        self._window.append(
            _Totals(now, totals.arrived, totals.arrived_s, totals.decodes, totals.ended, totals.ended_tokens)
        )
        while now - self._window[0].at > WINDOW_S:
            self._window.popleft()

    def _load(self, loads: Mapping[str, Load], now: float) -> ClusterLoad | None:
        first, last = self._window[0], self._totals
        seconds, arrived, ended = now - first.at, last.arrived - first.arrived, last.ended - first.ended
        written, decodes = last.ended_tokens - first.ended_tokens, last.decodes - first.decodes
        if len(loads) < 2 or seconds < LEAST_S or not (arrived and written and decodes):
            return None
        decoding = [load for load in loads.values() if load.tpot_s]
        prompting = [load.ttft_s for load in loads.values() if load.ttft_s]
        if not (decoding and prompting):
            return None
        requests = sum(load.waiting + load.running for load in decoding)
        base_s = median(load.base_s for load in decoding)
        beyond_s = sum(max(load.step_s - load.base_s, 0.0) for load in decoding)
        chunk_s = max(median(load.chunk_s for load in decoding), base_s)
        mean_s = (last.arrived_s - first.arrived_s) / arrived
        if not (base_s and mean_s):  # no cost table
            return None
        return ClusterLoad(
            instances=len(loads),
            prefill=(last.arrived_s - first.arrived_s) / seconds,
            requests=arrived / seconds,
            output=written / ended * decodes / arrived,
            context=sum(load.context for load in loads.values()),
            kv_tokens=min(load.kv_tokens for load in loads.values()),
            mean_s=mean_s,
            long_s=LONG * mean_s,
            base_s=base_s,
            request_s=beyond_s / requests if requests else 0.0,
            beside=max(1.0 - base_s / chunk_s, LEAST_BESIDE),
            ttft_s=AIMED * median(prompting),
            tpot_s=AIMED * median(load.tpot_s for load in decoding),
        )

    def _keep(self, wanted: int, loads: Mapping[str, Load]) -> None:
        """Keep so many instances: those that do now, then those with the fewest decodes."""
        order = sorted(loads, key=lambda iid: (iid not in self.kept, loads[iid].waiting + loads[iid].running))
        self.kept = dict.fromkeys(order[:wanted])
