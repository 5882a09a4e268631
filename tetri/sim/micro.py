"""The paper's scheduling microbenchmarks with the live cores: prefill orders (Figure 16), decode admission by
prediction accuracy (Figure 18) and dispatchers (Figure 19)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from statistics import fmean

from tetri.cost import Cost
from tetri.policy.rules import Rules
from tetri.sim.figures import plotted
from tetri.sim.paper import PAPER_RULES, measure
from tetri.sim.setup import Setup
from tetri.sim.traces import Arrival
from tetri.sim.workloads import Evaluation
from tetri.sim.world import World

ORDERS = (("fcfs", 16), ("sjf", 16), ("ljf", 16), ("sjf", 32), ("sjf", 64), ("sjf", 128))
ADMISSIONS = ("reserve_static", "reserve_dynamic", "peak")  # without greedy, which needs no prediction
ACCURACIES = (0.749, 1.0)
ADMITTED = 256  # requests of Figure 18
FEEDERS = 8  # its prefill instances: enough that only the decode instance limits, as with preloaded KV
#: KV tokens of its decode instance, fitted to greedy's mean JCT, the one curve of Figure 18 that is not TetriInfer's.
ADMITTED_KV = 24_000
DISPATCHERS = ("imbalance", "random", "power_of_two")
DISPATCHING = 4  # prefill instances of Figure 19, each with a dispatcher
PER_INSTANCE = 32  # requests of Figure 19, a quarter of them heavy
#: Figure 19 gives no lengths. 32 heavy decodes took 13.9 s, which is 290 steps of that batch in the cost table. Light
#: decodes have 20 to 100 tokens (section 2).
HEAVY_OUTPUT, LIGHT_OUTPUT, SHORT_PROMPT = 290, 60, 18


Values = dict[str, float]  # name of a measure -> value; "" is the one that the figure plots


@dataclass(frozen=True, slots=True)
class MicroCase:
    """One point of a figure. `run(evaluation, cost, seed)` measures it once; `paper` is the plotted value."""

    figure: str
    point: str
    paper: float | None
    run: Callable[[Evaluation, Cost, int], Values]


def vllm_ttft(evaluation: Evaluation, cost: Cost, seed: int) -> Values:
    """Return the mean TTFT in seconds of Mixed on the paper's vLLM baseline."""
    return {"": measure("vllm16", evaluation, "Mixed", cost, seed).ttft_mean}


def prefill_ttft(order: str, sched_batch: int, evaluation: Evaluation, cost: Cost, seed: int) -> Values:
    """Return the mean TTFT in seconds of Mixed on one prefill instance; every request wants one token, so nothing is
    decoded. Figure 16 uses ShareGPT, of which 128 requests have as many chunks as Mixed."""
    batch = [Arrival(each.at_s, each.prompt, 1) for each in evaluation.workloads["Mixed"].draw(seed)]
    setup = Setup(cost=cost, rules=Rules(order=order, sched_batch=sched_batch), seed=seed)
    return {"": fmean(outcome.ttft_s or 0.0 for outcome in World(setup, batch).run().done())}


def admitted(admit: str, accuracy: float, evaluation: Evaluation, cost: Cost, seed: int) -> Values:
    """Return the mean JCT in seconds of 256 requests of Mixed on one decode instance, and the share of requests that
    were preempted. Predictions take no time and are right in a share `accuracy` of the cases; 1 means exact lengths.
    `peak`, which is not in the paper, uses the high end of a range."""
    workload = evaluation.workloads["Mixed"]
    rules = replace(PAPER_RULES, admit=admit, length_accuracy=accuracy, length="oracle" if accuracy == 1 else "noisy")
    if admit == "peak":
        rules = replace(rules, admit_end="high")
    setup = Setup(
        cost=_without_predictor(cost),
        prefill=FEEDERS,
        rules=rules,
        context=workload.context,
        kv_tokens=ADMITTED_KV,
        seed=seed,
    )
    outcomes = World(setup, workload.draw(seed, ADMITTED)).run().done()
    preempted = fmean(outcome.preempted > 0 for outcome in outcomes)
    return {"": fmean(outcome.jct_s or 0.0 for outcome in outcomes), "preempted": preempted}


def decode_time(dispatcher: str, instances: int, evaluation: Evaluation, cost: Cost, seed: int) -> Values:
    """Return the seconds from the first decode step to the end of the last of 32 requests per decode instance, and the
    largest number of heavy requests on one instance."""
    count = PER_INSTANCE * instances
    outputs = [HEAVY_OUTPUT] * (count // 4) + [LIGHT_OUTPUT] * (count - count // 4)
    Random(f"dispatch {seed}").shuffle(outputs)
    rules = replace(PAPER_RULES, decode_route=dispatcher)
    setup = Setup(cost=_without_predictor(cost), prefill=DISPATCHING, decode=instances, rules=rules, seed=seed)
    result = World(setup, [Arrival(0.0, SHORT_PROMPT, output) for output in outputs]).run()
    decoded = [use for use in result.instances.values() if use.decode_tokens]
    seconds = max(use.last_s or 0.0 for use in decoded) - min(use.first_s or 0.0 for use in decoded)
    heavy = Counter(each.decode for each in result.done() if each.arrival.output == HEAVY_OUTPUT)
    return {"": seconds, "most heavy": max(heavy.values())}


def _without_predictor(cost: Cost) -> Cost:
    return replace(cost, predictor_s=0.0, predictor_token_s=0.0)


def cases() -> list[MicroCase]:
    """Return all points of the three figures."""
    paper = plotted()
    made = [MicroCase("figure16", "vllm16", paper["figure16"]["vllm16"], vllm_ttft)]
    for order, window in ORDERS:
        name = f"{order}-{window}"
        made.append(MicroCase("figure16", name, paper["figure16"][name], partial(prefill_ttft, order, window)))
    made.append(MicroCase("figure18", "greedy", paper["figure18"]["greedy"], partial(admitted, "greedy", 1.0)))
    for admit in ADMISSIONS:
        for accuracy in ACCURACIES:
            name = f"{admit}-{accuracy:g}"
            made.append(MicroCase("figure18", name, paper["figure18"].get(name), partial(admitted, admit, accuracy)))
    for dispatcher in DISPATCHERS:
        for instances, shown in paper["figure19"][dispatcher]:
            run = partial(decode_time, dispatcher, instances)
            made.append(MicroCase("figure19", f"{dispatcher} on {instances}", shown, run))
    return made
