"""The paper's end-to-end evaluation (section 5.1): five closed batches on TetriInfer and on coupled baselines.

TetriInfer is simulated with the live cores: a `World` with one prefill and one decode instance and the settings of
section 5.1. Nothing was fitted to TetriInfer's curves, so its results are predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from tetri.cost import Cost
from tetri.policy.coupled import CoupledLimits
from tetri.policy.rules import Rules
from tetri.policy.views import FlipSettings
from tetri.sim import coupled
from tetri.sim.figures import plotted
from tetri.sim.setup import Setup
from tetri.sim.traces import Arrival
from tetri.sim.workloads import Baseline, Evaluation
from tetri.sim.world import World

LINKS = {"tetri-roce": 25e9, "tetri-nvlink": 300e9}  # bytes/s: 200 Gb/s and 300 GB/s (section 4.1)
TODAY = CoupledLimits(slots=256, step_tokens=2048, kv_tokens=0)  # vLLM V1's defaults when it serves
COUPLED = {"vllm16": 1, "vllm-today": 1, "vllm-today-x2": 2}  # system -> replicas
SYSTEMS = ("vllm16", "tetri-roce", "tetri-nvlink", "vllm-today", "vllm-today-x2")
METRICS = ("ttft_mean", "jct_mean", "resource_s", "perf_per_dollar", "requests_per_instance_s")
RATIOS = METRICS[:3]
#: Section 5.1: SJF in windows of 16, power of two, reserve-dynamic with the low end of the range, and a predictor that
#: is right in 74.9 % of the cases with ranges of 200 tokens and runs in parallel with the main model.
PAPER_RULES = Rules(
    order="sjf",
    sched_batch=16,
    decode_route="power_of_two",
    admit="reserve_dynamic",
    admit_end="low",
    length="noisy",
    length_granularity=200,
    length_accuracy=0.749,
)


@dataclass(frozen=True, slots=True)
class Measured:
    """The result of one run, in seconds. `resource_s` is the paper's resource usage time: the sum over the instances of
    the time from the batch's arrival to the end of the instance's part, which is the last TTFT for a prefill instance.
    `makespan_s` is the last JCT."""

    ttft_mean: float
    jct_mean: float
    resource_s: float
    makespan_s: float
    requests: int
    instances: int

    @property
    def requests_per_instance_s(self) -> float:
        """Requests per second and instance over the whole makespan, idle time included. Not a metric of the paper."""
        return self.requests / (self.instances * self.makespan_s)


@dataclass(frozen=True, slots=True)
class PaperRow:
    """One value of the results. `paper` is the paper's value, None where it shows none."""

    workload: str
    system: str
    metric: str
    value: float
    paper: float | None


@dataclass(frozen=True, slots=True)
class Ratio:
    """A metric of TetriInfer with the faster link, divided by that of the 16-slot vLLM."""

    workload: str
    metric: str
    value: float
    paper: float

    @property
    def off(self) -> float:
        """The relative difference to the paper's ratio."""
        return self.value / self.paper - 1

    @property
    def same_side(self) -> bool:
        """Whether both ratios say that the same system needs less."""
        return (self.value < 1) == (self.paper < 1)


def tetri_setup(cost: Cost, bytes_s: float, context: int, seed: int) -> Setup:
    """Return the setup of section 5.1 with a link of `bytes_s` bytes per second."""
    return Setup(
        cost=cost,
        rules=PAPER_RULES,
        link_bytes_s=bytes_s,
        transfer="request",
        context=context,
        seed=seed,
        flip="idle",
        flip_settings=FlipSettings(idle_s=60.0),
    )


def measure(system: str, evaluation: Evaluation, name: str, cost: Cost, seed: int) -> Measured:
    """Simulate one draw of one workload on one system. Raises ValueError if a request is not served."""
    workload = evaluation.workloads[name]
    batch = workload.draw(seed)
    if system in LINKS:
        return _tetri(batch, tetri_setup(cost, LINKS[system], workload.context, seed))
    return _coupled(batch, system, evaluation.baseline, cost)


def _tetri(batch: Sequence[Arrival], setup: Setup) -> Measured:
    outcomes = World(setup, batch).run().done()
    ttfts = [outcome.ttft_s for outcome in outcomes if outcome.ttft_s is not None]
    jcts = [outcome.jct_s for outcome in outcomes if outcome.jct_s is not None]
    if not len(ttfts) == len(jcts) == len(batch):
        raise ValueError(f"{len(batch) - len(jcts)} of {len(batch)} requests were not served")
    return Measured(fmean(ttfts), fmean(jcts), max(ttfts) + max(jcts), max(jcts), len(batch), 2)


def _coupled(batch: Sequence[Arrival], system: str, baseline: Baseline, cost: Cost) -> Measured:
    replicas = COUPLED[system]
    if system == "vllm16":
        limits = CoupledLimits(baseline.slots, baseline.step_tokens, cost.kv_tokens)
        served = coupled.run("prefill_first", limits, cost, batch, replicas, baseline.join_s).served
    else:
        limits = CoupledLimits(TODAY.slots, TODAY.step_tokens, cost.kv_tokens)
        served = coupled.run("chunked", limits, cost, batch, replicas).served
    ends = [
        max((request.jct_s for request in served if request.replica == place), default=0.0) for place in range(replicas)
    ]
    means = fmean(request.ttft_s for request in served), fmean(request.jct_s for request in served)
    return Measured(*means, sum(ends), max(ends), len(batch), replicas)


Runs = dict[tuple[str, str], list[Measured]]  # (workload, system) -> one result for each seed


def rows(runs: Runs) -> list[PaperRow]:
    """Return the means over the seeds. Every workload needs runs of "vllm16", the base of the paper's perf/$."""
    made = []
    for (workload, system), measured in runs.items():
        base = runs[workload, "vllm16"]
        for metric in METRICS:
            value = _per_dollar(measured, base) if metric == "perf_per_dollar" else _mean(measured, metric)
            made.append(PaperRow(workload, system, metric, value, _paper(workload, system, metric)))
    return made


def ratios(runs: Runs) -> list[Ratio]:
    """Return the ratios of TetriInfer to the paper's vLLM, for each workload and metric of RATIOS."""
    made = []
    for workload in dict.fromkeys(workload for workload, _ in runs):
        shown = plotted()["end_to_end"][workload]
        for metric in RATIOS:
            tetri, vllm = (_mean(runs[workload, system], metric) for system in ("tetri-nvlink", "vllm16"))
            paper = shown[metric]["tetri-nvlink"] / shown[metric]["vllm16"]
            made.append(Ratio(workload, metric, tetri / vllm, paper))
    return made


def _mean(measured: Sequence[Measured], metric: str) -> float:
    return fmean(getattr(each, metric) for each in measured)


def _per_dollar(measured: Sequence[Measured], base: Sequence[Measured]) -> float:
    """Return the paper's perf/$. The paper does not define it; (1 + JCT reduction) / (ratio of resource times)
    reproduces all five of its values."""
    jct, resource = (_mean(measured, metric) / _mean(base, metric) for metric in ("jct_mean", "resource_s"))
    return (2 - jct) / resource


def _paper(workload: str, system: str, metric: str) -> float | None:
    shown = plotted()["end_to_end"][workload]
    if system not in shown["jct_mean"]:
        return None
    if metric == "perf_per_dollar":
        value = {"vllm16": 1.0, "tetri-nvlink": plotted()["perf_per_dollar"][workload]}.get(system)
        return value
    if metric == "requests_per_instance_s":
        return None  # the paper does not plot it; docs/paper.md derives it
    return float(shown[metric][system])
