"""What the broker measures: histograms, and counts by label. docs/metrics.md lists them."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

from tetri.request import ROLES, SLO_RESULTS, Receipt, Stage
from tetri.wire.clients import Done
from tetri.wire.observation import Histogram, Measures

# Upper bounds of the buckets, in seconds or tokens, as in vLLM, with more of them for fast models.
FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
EACH_TOKEN = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
WHOLE = (
    *(0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
TOKENS = tuple(float(digit * 10**power) for power in range(7) for digit in (1, 2, 5))
MEASURED_STAGES = (Stage.QUEUED, Stage.PREFILL, Stage.MOVING, Stage.WAITING, Stage.DECODE)
BOUNDS = {
    "ttft": FIRST_TOKEN,
    "itl": EACH_TOKEN,
    "tpot": EACH_TOKEN,
    "jct": WHOLE,
    **{f"stage_{stage}": FIRST_TOKEN for stage in MEASURED_STAGES},
    "queue_predicted": FIRST_TOKEN,
    "prompt_tokens": TOKENS,
    "output_tokens": TOKENS,
}
# Labels that are counted from the start, with 0: a rate can then be formed from the first event on.
LABELS = {
    "requests_ended": ("stop", "length", "cancelled", "deadline", "error"),
    "requests_refused": ("invalid", "too_long", "too_many_choices", "full", "repeated_key"),
    "retries": ("worker_lost", "worker_restarted", "not_held", "kv_lost", "kv_unread", "given_up"),
    "role_changes": tuple(f"{was}>{role}" for was in ROLES for role in ROLES if was != role),
    "slo_requests": SLO_RESULTS,
    "tokens": ("prompt", "output", "local", "adopted", "recomputed", "continued"),
}


class Buckets:
    """A histogram that counts: `counts[i]` values are at most `bounds[i]` and above the bound before."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds, self.counts, self.total = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Count a value, so many times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times


class Meters:
    """Counts and histograms since the broker's start."""

    def __init__(self) -> None:
        self.counts = {name: Counter(dict.fromkeys(labels, 0)) for name, labels in LABELS.items()}
        self.histograms = {name: Buckets(bounds) for name, bounds in BOUNDS.items()}
        self._stages = {stage.value: self.histograms[f"stage_{stage}"] for stage in MEASURED_STAGES}

    def count(self, name: str, label: str, times: int = 1) -> None:
        """Count something under a label."""
        self.counts[name][label] += times

    def ended(self, done: Done, tpot_s: float | None) -> None:
        """Measure a choice that has ended. Its TTFT was measured when its first token came."""
        histograms, usage = self.histograms, done.usage
        self.count("requests_ended", done.reason)
        if done.slo_result:
            self.count("slo_requests", done.slo_result)
        self._count_tokens(done.receipt, usage.prompt_tokens, usage.completion_tokens)
        for name, seconds in (("tpot", tpot_s), ("jct", done.jct_s)):
            if seconds is not None:
                histograms[name].add(seconds)
        for stage, seconds in done.timeline.items():
            self._stages[stage].add(seconds)
        histograms["prompt_tokens"].add(usage.prompt_tokens)
        histograms["output_tokens"].add(usage.completion_tokens)

    def _count_tokens(self, receipt: Receipt, prompt: int, output: int) -> None:
        tokens = self.counts["tokens"]
        tokens["prompt"] += prompt
        tokens["output"] += output
        tokens["local"] += receipt.local or 0
        tokens["adopted"] += receipt.adopted or 0
        tokens["recomputed"] += receipt.recomputed or 0
        tokens["continued"] += receipt.continued

    def measures(self) -> Measures:
        """All of them, as they are sent."""
        return Measures(
            counts={name: dict(counts) for name, counts in self.counts.items()},
            histograms={
                name: Histogram(bounds=list(found.bounds), counts=list(found.counts), total=found.total)
                for name, found in self.histograms.items()
            },
        )
