"""Simulate the coupled baselines with the same requests and hardware as a `World`, and with the same result type."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tetri.core.broker.slo import Limiter
from tetri.policy.coupled import CoupledLimits
from tetri.request import Slo
from tetri.sim import coupled
from tetri.sim.clients import Outcome
from tetri.sim.instance import Use
from tetri.sim.report import SimResult
from tetri.sim.setup import Setup, SimError
from tetri.sim.traces import Arrival
from tetri.sim.workloads import load

TODAY = CoupledLimits(slots=256, step_tokens=2048, kv_tokens=0)  # vLLM V1's defaults when it serves
COUNTED = ("steps", "prefill_tokens", "decode_tokens")
SYSTEMS = ("coupled16", "coupled")  # the paper's baseline, with 16 slots; vLLM's defaults of today


def serve(system: str, setup: Setup, requests: Iterable[Arrival]) -> SimResult:
    """Simulate one of SYSTEMS. Every instance of `setup`, whatever its role, is an independent replica of a coupled
    engine. A request goes to the replica with the fewest open requests; one that exceeds the context is refused. Raises
    SimError."""
    setup.check()
    capacity = setup.capacity()
    kv_tokens = capacity.blocks * capacity.block_tokens
    replicas = setup.prefill + setup.decode + setup.mixed + setup.auto
    outcomes: list[Outcome] = []
    limiter = Limiter(setup.slo, setup.cost, capacity.chunk_tokens)
    accepted = _accepted(requests, min(kv_tokens, capacity.context), outcomes, limiter)
    try:
        if system == "coupled16":
            baseline = load().baseline
            limits = CoupledLimits(baseline.slots, baseline.step_tokens, kv_tokens)
            made = coupled.run("prefill_first", limits, setup.cost, accepted, replicas, baseline.join_s)
        else:
            limits = CoupledLimits(TODAY.slots, TODAY.step_tokens, kv_tokens)
            made = coupled.run("chunked", limits, setup.cost, accepted, replicas)
    except ValueError as error:
        raise SimError(str(error)) from None
    if not outcomes:
        raise SimError("there are no requests")
    open_ones = [outcome for outcome in outcomes if outcome.state == "open"]
    for outcome, request in zip(open_ones, made.served, strict=True):
        _fill(outcome, request)
    instances = {f"c{place}": _use(made, place, setup.spans) for place in range(replicas)}
    counters = {
        "preempted": sum(request.preempted for request in made.served),
        "refused": len(outcomes) - len(open_ones),
        **{name: sum(getattr(use, name) for use in instances.values()) for name in COUNTED},
    }
    return SimResult(outcomes, instances, counters, max((request.end_s for request in made.served), default=0.0))


def _accepted(
    requests: Iterable[Arrival], most: int, outcomes: list[Outcome], limiter: Limiter
) -> Iterator[Arrival]:
    """Yield the requests that fit; append an outcome for each request, with the limits that a broker would find."""
    for arrival in requests:
        tokens = arrival.prompt + arrival.output
        fits = tokens <= most
        why = "" if fits else f"{tokens} tokens are more than the context of {most}"
        outcomes.append(Outcome(arrival, "open" if fits else "refused", why=why))
        if fits:
            outcomes[-1].slo = limiter.of(Slo(), arrival.prompt)
            yield arrival


def _fill(outcome: Outcome, request: coupled.CoupledRequest) -> None:
    outcome.state, outcome.ttft_s, outcome.jct_s = "done", request.ttft_s, request.jct_s
    if request.output > 1:
        outcome.tpot_s = (request.jct_s - request.ttft_s) / (request.output - 1)
    outcome.prefill = outcome.decode = f"c{request.replica}"
    outcome.preempted, outcome.attempts = request.preempted, 1


def _use(made: coupled.CoupledOutcome, place: int, spans: bool) -> Use:
    use = Use(roles=[(0.0, "coupled")], spans=[] if spans else None)
    for start, stop in made.busy[place]:
        use.add(start, stop, "mixed")
    served = [request for request in made.served if request.replica == place]
    use.steps = made.passes[place]
    use.prefill_tokens = sum(request.prompt for request in served)
    use.decode_tokens = sum(request.output - 1 for request in served)
    use.preempted = sum(request.preempted for request in served)
    return use
