"""Report a simulation: as plain values for JSON, and as a table. The same result gives the same bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tetri.metrics import percentile, summarise
from tetri.request import SLO_RESULTS
from tetri.sim.clients import Outcome
from tetri.sim.instance import Use

METRICS = ("ttft", "jct", "tpot")
SHARES = ("mean", "p50", "p90", "p99")


@dataclass(slots=True)
class SimResult:
    """The result of one run: `outcomes` in order of arrival, `instances` by name, `counters` summed over the instances.
    `end_s`: when the last request ended, in seconds. `faults`: injected faults by kind, None without faults."""

    outcomes: list[Outcome]
    instances: dict[str, Use]
    counters: dict[str, int]
    end_s: float
    faults: dict[str, int] | None = None

    def done(self) -> list[Outcome]:
        """Return the outcomes of the requests that succeeded."""
        return [outcome for outcome in self.outcomes if outcome.state == "done"]


def summary(result: SimResult) -> dict[str, Any]:
    """Return the summary for JSON, in seconds and tokens. A metric without values is None."""
    states, done = [outcome.state for outcome in result.outcomes], result.done()
    lasted = result.end_s - result.outcomes[0].arrival.at_s
    tokens = sum(outcome.arrival.n * outcome.arrival.output for outcome in done)
    injected = {} if result.faults is None else {"faults": {"injected": result.faults, "promises": "held"}}
    return {
        "requests": len(states),
        "done": len(done),
        "failed": states.count("failed"),
        "refused": states.count("refused"),
        "ttft": _spread(outcome.ttft_s for outcome in done),
        "jct": _spread(outcome.jct_s for outcome in done),
        "tpot": _spread(outcome.tpot_s for outcome in done),
        "slo": _kept(result.outcomes, lasted),
        "makespan_s": lasted,
        "requests_per_s": len(done) / lasted if lasted else None,
        "output_tokens_per_s": tokens / lasted if lasted else None,
        "preempted_requests": sum(outcome.preempted > 0 for outcome in done),
        "why": _counted(outcome.why for outcome in result.outcomes if outcome.why),
        "instances": [_instance(iid, use, lasted) for iid, use in result.instances.items()],
        "counters": result.counters,
        **injected,
    }


def _spread(values: Iterable[float | None]) -> dict[str, float] | None:
    there = [value for value in values if value is not None]
    if not there:
        return None
    made = summarise(there)
    return {share: getattr(made, share) for share in SHARES}


def _kept(outcomes: list[Outcome], lasted: float) -> dict[str, Any]:
    """How the requests kept their limits of latency, of which the medians are shown: `attainment` is the share that
    kept both, `goodput_per_s` their number per second. A refused request has not."""
    results = Counter(outcome.slo_result for outcome in outcomes)
    limits = [(outcome.slo.ttft_s, outcome.slo.tpot_s) for outcome in outcomes if outcome.state != "refused"]
    ttft_s, tpot_s = ([*filter(None, values)] for values in zip(*limits, strict=True)) if limits else ([], [])
    return {
        "ttft_s": percentile(ttft_s, 0.5) if ttft_s else None,
        "tpot_s": percentile(tpot_s, 0.5) if tpot_s else None,
        "attainment": results["met"] / len(outcomes),
        "goodput_per_s": results["met"] / lasted if lasted else None,
        "results": {name: results[name] for name in SLO_RESULTS},
    }


def _counted(whys: Iterable[str]) -> dict[str, int]:
    """Count the reasons; only the first 20 different ones, since some contain a number of tokens."""
    counts: dict[str, int] = {}
    for why in whys:
        counts[why] = counts.get(why, 0) + 1
    return dict(list(counts.items())[:20])


def _instance(iid: str, use: Use, lasted: float) -> dict[str, Any]:
    busy = sum(use.busy_s.values())
    return {
        "iid": iid,
        "roles": [[since, role] for since, role in use.roles],
        "busy": busy / lasted if lasted else None,
        "busy_s": dict(sorted(use.busy_s.items())),
        "first_s": use.first_s,
        "last_s": use.last_s,
        "steps": use.steps,
        "prefill_tokens": use.prefill_tokens,
        "decode_tokens": use.decode_tokens,
        "preempted": use.preempted,
    }


def table(made: dict[str, Any]) -> str:
    """Format the summary as text."""
    lines = [
        f"requests  {made['requests']}: {made['done']} done, {made['failed']} failed, {made['refused']} refused",
        f"{'seconds':10}" + "".join(f"{share:>10}" for share in SHARES),
    ]
    for metric in METRICS:
        values = made[metric] or {}
        lines.append(f"{metric:10}" + "".join(f"{_shown(values.get(share)):>10}" for share in SHARES))
    lines.append(
        f"makespan  {_shown(made['makespan_s'])} s, {_shown(made['requests_per_s'])} requests/s,"
        f" {_shown(made['output_tokens_per_s'])} output tokens/s, {made['preempted_requests']} requests preempted"
    )
    lines.append(_limits(made["slo"]))
    lines += [f"{count} x {why}" for why, count in made["why"].items()]
    lines += ["", *_instances(made["instances"])]
    if "faults" in made:
        lines += ["", *_faults(made["faults"])]
    if "run" in made:
        lines += ["", f"simulated in {made['run']['wall_s']:.1f} s, {made['run']['peak_rss_mb']:.0f} MB"]
    return "\n".join(lines)


def _limits(slo: dict[str, Any]) -> str:
    missed = ", ".join(f"{count} {name}" for name, count in slo["results"].items() if count and name != "met")
    limits = f"ttft {_shown(slo['ttft_s'])}, tpot {_shown(slo['tpot_s'])} (medians)"
    kept = f"{slo['attainment']:.1%} kept, goodput {_shown(slo['goodput_per_s'])} requests/s"
    return f"limits    {limits}: {kept}{f'; missed: {missed}' if missed else ''}"


def _instances(rows: list[dict[str, Any]]) -> list[str]:
    """One line for each instance, or for each role if there are more than 16."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        name = row["iid"] if len(rows) <= 16 else f"all {row['roles'][0][1]}"
        groups.setdefault(name, []).append(row)
    lines = [f"{'instance':14}{'busy':>8}{'steps':>12}{'prefilled':>12}{'decoded':>12}{'preempted':>11}"]
    for name, group in groups.items():
        busy = sum(row["busy"] or 0.0 for row in group) / len(group)
        sums = [sum(row[key] for row in group) for key in ("steps", "prefill_tokens", "decode_tokens", "preempted")]
        lines.append(f"{name:14}{busy:8.1%}{sums[0]:12}{sums[1]:12}{sums[2]:12}{sums[3]:11}")
    return lines


def _faults(faults: dict[str, Any]) -> list[str]:
    counts = ", ".join(f"{count} x {kind}" for kind, count in faults["injected"].items())
    return [f"injected faults: {counts}", f"promises: all {faults['promises']}"]


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
