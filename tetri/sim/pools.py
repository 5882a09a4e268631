"""The instances of one role as a pool of replicas, which serves a demand without the rest of a deployment.

A pool uses the replicas of `coupled` instead of the live cores, which take a hundred times as long: a prefill instance
is a replica whose requests end with the first token, a decode instance one whose prompts cost nothing, and a coupled
instance does both.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, floor, fsum, inf
from random import Random
from statistics import stdev
from typing import Protocol, TypeVar

from tetri.cost import Cost
from tetri.engine_request import Span
from tetri.metrics import percentile
from tetri.policy.admit import next_growth
from tetri.policy.coupled import CoupledLimits
from tetri.sim import coupled
from tetri.sim.coupled import CoupledOutcome, Receiver, Replica, Routing
from tetri.sim.setup import Setup
from tetri.sim.traces import Arrival, TokenCounts

Each = TypeVar("Each")
VerdictT = TypeVar("VerdictT", bound="Verdict")
Lengths = Sequence[tuple[int, int]]  # prompt and output tokens of requests
REQUESTS = 8000  # the fewest that a pool serves
TURNS = 6  # at least so many times the requests that are open at once: the start and the end of a run do not count
LONGER = (1, 5)  # times as many requests are served: the second only where the first leave a limit to chance
PARTS, SURE = 8, 2.0  # a limit is not left to chance if it is so many times as far as the parts of a run are apart
COUNTED = (0.3, 0.8)  # the requests that count, as shares of their number
SAMPLE = 4096  # lengths
POOL = 16  # a larger pool of decode or coupled instances is simulated as one of so many, with its share of the rate
PROMPT_POOL = 64  # likewise of prefill instances, which profit from each other up to a larger number
MOST = 2000  # instances of a role
SLOTS = 256  # the most prompts in one chunk
WHOLE = 1 << 40  # a chunk of any prompt


@dataclass(frozen=True, slots=True)
class Goal:
    """At `rate` requests a second (Poisson), `share` of the requests have their first token within `ttft_s` seconds,
    and `share` of them get the others at `tpot_s` seconds a token or less."""

    rate: float
    ttft_s: float
    tpot_s: float
    share: float = 0.9


@dataclass(frozen=True, slots=True)
class Served:
    """How so many `instances` of a role serve the demand. `ttft_s`, `tpot_s`: at the goal's share, None for a phase
    that the role does not have, inf if they fall behind for ever. `busy`: share of the time. `batch`: requests that an
    instance decodes at once, on average; `memory`: share of its KV memory that these hold. `sure`: whether the limits
    are kept or missed by more than chance."""

    instances: int
    ttft_s: float | None = None
    tpot_s: float | None = None
    busy: float = 1.0
    batch: float | None = None
    memory: float | None = None
    sure: bool = True

    @property
    def behind(self) -> bool:
        """Whether they do not keep up with the demand."""
        return inf in (self.ttft_s, self.tpot_s)

    def reaches(self, goal: Goal) -> bool:
        """Whether both limits are kept."""
        return (self.ttft_s or 0.0) <= goal.ttft_s and (self.tpot_s or 0.0) <= goal.tpot_s


class Verdict(Protocol):
    """Whether limits are kept, and whether that is sure."""

    @property
    def sure(self) -> bool:
        """Whether it is more than chance."""


class Demand:
    """The requests, and the pools that can serve them. `setup` describes one instance and the link; its numbers of
    instances do not matter. `lengths`: a sample of the requests."""

    def __init__(self, goal: Goal, setup: Setup, lengths: Lengths, seed: int) -> None:
        self.goal, self.setup, self.lengths, self.seed = goal, setup, lengths, seed
        self.cost, self.capacity = setup.cost, setup.capacity()
        self._handovers: dict[tuple[int, float, int], list[tuple[float, int, int]]] = {}
        self.kv_tokens = self.capacity.blocks * self.capacity.block_tokens

    def arrivals(self, rate: float, requests: int) -> Iterator[Arrival]:
        """Draw requests with exactly this rate, and with all lengths equally often: a chance that changes the load
        would say more about the draw than about the instances."""
        rng = Random(f"demand {self.seed}")
        gaps = [rng.expovariate(1.0) for _ in range(requests)]
        gap_s = requests / rate / fsum(gaps)
        now, lengths = 0.0, [*self.lengths]
        for number, gap in enumerate(gaps):
            if number % len(lengths) == 0:
                rng.shuffle(lengths)
            now += gap * gap_s
            yield Arrival(now, *lengths[number % len(lengths)])

    # ------------------------------------------------------------ one request by itself

    def prompt_s(self, tokens: int) -> float:
        """Seconds from the arrival of a prompt at an idle instance to its first token."""
        return self.cost.prompt_s(tokens, 0, self.capacity.chunk_tokens) + 2 * self.setup.link_latency_s

    def handover_s(self, prompt: int) -> float:
        """Seconds from the first token until the decode instance has the KV, over an idle link. Chunks are sent while
        the next ones are computed, so that the last one counts, or all but the first if the link is slower."""
        chunk = min(prompt, self.capacity.chunk_tokens)
        last_s, whole_s = self._fetch_s(chunk), self._fetch_s(prompt)
        if self.setup.transfer == "request":
            last_s = whole_s
        hidden_s = self.prompt_s(prompt) - self.prompt_s(chunk)
        return max(last_s, whole_s - hidden_s) + self.setup.link_latency_s

    def _fetch_s(self, tokens: int) -> float:
        return tokens * self.cost.kv_token_bytes / self.setup.link_bytes_s

    def least_tpot_s(self, prompt: int, output: int) -> float:
        """Seconds for each token after the first on an idle instance; the output has more than one."""
        return (self.handover_s(prompt) + self.cost.decode_run_s(1, prompt + 1, output - 1)) / (output - 1)

    # ------------------------------------------------------------ the load, in instances

    @cached_property
    def prefill_load(self) -> float:
        """Prefill instances that would be busy all the time with the best chunks: fewer fall behind."""
        chunk, start_s = self.capacity.chunk_tokens, self.cost.prefill_start_s
        sizes = [*(tokens for tokens, _ in self.cost.prefill if 1 <= tokens < chunk), chunk]
        token_s = min(self.cost.chunk_s([Span("", 0, int(tokens))]) / int(tokens) for tokens in sizes)
        work = (token_s * prompt + start_s * prompt * max(prompt - chunk, 0) / 2 for prompt, _ in self.lengths)
        return self.goal.rate * fsum(work) / len(self.lengths)

    @cached_property
    def decode_load(self) -> float:
        """Decode instances that would always have the largest batch that keeps the limit of TPOT."""
        return max(self._decoding(self._largest[0]), self._fetching)

    @property
    def coupled_load(self) -> float:
        """Coupled instances that keep the limit of TPOT on average: their decode steps wait for the chunks of prompts,
        and the batch is what such a step then has by Little's law."""
        limit_s, steps = self.goal.tpot_s, self._steps / len(self.lengths)

        def timely(instances: int) -> bool:
            batch = max(min(round(self.goal.rate * steps * limit_s / instances), self._full[0]), 1)
            return self._step_s(batch) <= limit_s * (1 - self.prefill_load / instances)

        least = floor(max(self.prefill_load, self._decoding(self._full[0])))
        return least + bisect_left(range(least + 1, 2 * MOST), True, key=timely)

    @property
    def decode_bound(self) -> str:
        """What keeps a decode instance from a larger load: tpot, kv_memory, max_batch or link."""
        return "link" if self._fetching > self._decoding(self._largest[0]) else self._largest[1]

    @cached_property
    def _full(self) -> tuple[int, str]:
        """The largest batch that an instance can have, and why."""
        most = {"max_batch": self.capacity.max_batch, "kv_memory": int(self.kv_tokens / max(self._context, 1.0))}
        bound = min(most, key=most.__getitem__)
        return max(most[bound], 1), bound

    @cached_property
    def _largest(self) -> tuple[int, str]:
        """The largest batch that also keeps the limit of TPOT, and what keeps it from being larger."""
        most, bound = self._full
        timely = bisect_right(range(1, most + 1), self.goal.tpot_s, key=self._step_s)
        return (max(timely, 1), "tpot") if timely < most else (most, bound)

    def _step_s(self, batch: int) -> float:
        return self.cost.decode_s(batch, round(batch * self._context))

    def _decoding(self, batch: int) -> float:
        """Instances that write the outputs with always this batch."""
        return self.goal.rate * self._steps / len(self.lengths) * self._step_s(batch) / batch

    @cached_property
    def _fetching(self) -> float:
        """Instances whose link is busy all the time."""
        return self.goal.rate * self._fetch_s(1) * self._prompts / len(self.lengths)

    @cached_property
    def _steps(self) -> int:
        return sum(output - 1 for _, output in self.lengths)

    @cached_property
    def _prompts(self) -> int:
        return sum(prompt for prompt, output in self.lengths if output > 1)

    @cached_property
    def _context(self) -> float:
        """Mean tokens of context of a request, over its decode steps."""
        total = sum((output - 1) * (prompt + output / 2) for prompt, output in self.lengths)
        return total / self._steps if self._steps else 0.0

    # ------------------------------------------------------------ the pools

    def prefill(self, instances: int, times: int = 1) -> Served:
        """Serve the prompts, of `times` as many requests as the fewest that tell anything."""
        if self.prefill_load >= instances:
            return Served(instances, ttft_s=inf)
        made = self._prefilled(*self._scaled(instances, PROMPT_POOL), times * REQUESTS)
        ttfts = self._ttfts(made)
        return Served(instances, self._percentile(ttfts), busy=_busy(made), sure=self.sure(ttfts, []))

    def _prefilled(self, replicas: int, rate: float, requests: int) -> CoupledOutcome:
        slots = min(SLOTS, self.capacity.max_batch)
        limits = CoupledLimits(slots, self.capacity.chunk_tokens, self.kv_tokens)
        arrivals = (replace(each, output=1) for each in self.arrivals(rate, requests))
        return coupled.run("chunked", limits, self.cost, arrivals, replicas, route=least_queued)

    def decode(self, instances: int, prefill: int, times: int = 1) -> Served:
        """Write the outputs of the prompts that so many `prefill` instances hand over. A request enters at the end of a
        step: of the one in which it arrives if its KV is there at once, else of the next, since an instance begins to
        fetch KV between two steps."""
        if not self._steps:
            return Served(instances, tpot_s=0.0, busy=0.0, batch=0.0, memory=0.0)
        if max(self._decoding(self._full[0]), self._fetching) >= instances:
            return Served(instances, tpot_s=inf)
        fetches = int(self._fetch_s(1) > 0)  # steps that count as output without a token in memory
        limits = CoupledLimits(self.capacity.max_batch, WHOLE, self.kv_tokens + fetches)
        entry_s = 0.0 if fetches else self.cost.decode_s(1, 0)
        cost = replace(self.cost, prefill=((1.0, entry_s),), prefill_start_s=0.0)
        replicas, rate = self._scaled(instances, POOL)
        prompting = ceil(prefill * replicas / instances)
        route = power_of_two(Random(self.seed), prompting, 2 * self.setup.load_s)
        handed = self._handed(prompting, rate, times * self._requests(replicas))
        entries = (Arrival(at_s, prompt + 1, output - 1 + fetches) for at_s, prompt, output in handed)
        made = coupled.run("chunked", limits, cost, entries, replicas, route=route, make=self._receiver)
        wait_s = self._link_wait_s(instances)
        tpots = [
            (entry.jct_s + self.handover_s(entry.prompt - 1) + wait_s) / (entry.output - fetches)
            for entry in counted(made.served)
        ]
        return Served(instances, None, self._percentile(tpots), _busy(made), *self._held(made), self.sure([], tpots))

    def _receiver(self, rule: str, limits: CoupledLimits, cost: Cost, join_s: float) -> Replica:
        """A decode instance."""
        chunk, kept = self.capacity.chunk_tokens, next_growth(1) * self.capacity.block_tokens
        return Receiver(rule, limits, cost, join_s, kept, again_s=lambda tokens: self.cost.prompt_s(tokens, 0, chunk))

    def _handed(self, replicas: int, rate: float, requests: int) -> list[tuple[float, int, int]]:
        """(time of the first token, prompt tokens, output tokens) of each request that needs more tokens, by time."""
        key = replicas, rate, requests
        if key not in self._handovers:
            served = self._prefilled(*key).served
            asked = self.arrivals(rate, requests)
            self._handovers[key] = sorted(
                (one.end_s, one.prompt, each.output) for one, each in zip(served, asked, strict=True) if each.output > 1
            )
        return self._handovers[key]

    def coupled(self, instances: int) -> Served:
        """Do both on each instance, as vLLM does."""
        if max(self.prefill_load, self._decoding(self._full[0])) >= instances:
            return Served(instances, inf, inf)
        limits = CoupledLimits(self.capacity.max_batch, self.capacity.chunk_tokens, self.kv_tokens)
        replicas, rate = self._scaled(instances, POOL)
        arrivals = self.arrivals(rate, self._requests(replicas))
        made = coupled.run("chunked", limits, self.cost, arrivals, replicas)
        requests, ttfts = counted(made.served), self._ttfts(made)
        tpots = [(each.jct_s - each.ttft_s) / (each.output - 1) for each in requests if each.output > 1] or [0.0]
        found = self._percentile(ttfts), self._percentile(tpots)
        return Served(instances, *found, _busy(made), *self._held(made), self.sure(ttfts, tpots))

    def _scaled(self, instances: int, most: int) -> tuple[int, float]:
        """(replicas that are simulated, the rate of their requests)."""
        replicas = min(instances, most)
        return replicas, self.goal.rate * replicas / instances

    def _requests(self, replicas: int) -> int:
        return max(REQUESTS, TURNS * replicas * self._largest[0])

    def _link_wait_s(self, instances: int) -> float:
        """Mean wait for the link of an instance, which carries one prompt after the other (M/D/1)."""
        load = self._fetching / instances
        return self._fetching / self.goal.rate * load / (1 - load) / 2

    def _ttfts(self, made: CoupledOutcome) -> list[float]:
        return [request.ttft_s + 2 * self.setup.link_latency_s for request in counted(made.served)]

    def _percentile(self, values: Sequence[float]) -> float:
        return percentile(values, self.goal.share)

    def sure(self, ttfts: Sequence[float], tpots: Sequence[float]) -> bool:
        """Whether these times of consecutive requests keep both limits, or miss one, by more than chance."""
        limits = (ttfts, self.goal.ttft_s), (tpots, self.goal.tpot_s)
        return abs(min(below(values, self.goal.share, limit) for values, limit in limits if values)) > SURE

    def _held(self, made: CoupledOutcome) -> tuple[float, float]:
        """(requests that an instance decodes at once, share of its memory that they hold), by Little's law."""
        lasted = made.served[-1].arrival_s * len(made.busy)
        batch = fsum(request.end_s - request.first_s for request in made.served) / lasted
        return batch, batch * self._context / self.kv_tokens


def sampled(prompt: TokenCounts, output: TokenCounts, seed: int) -> Lengths:
    """A sample of requests with these distributions of lengths, each by itself."""
    outputs = output.spread(SAMPLE)
    Random(f"lengths {seed}").shuffle(outputs)
    return list(zip(prompt.spread(SAMPLE), outputs, strict=True))


def below(values: Sequence[float], share: float, limit: float) -> float:
    """How far the percentile of consecutive values is below a limit, in standard deviations of that of their parts: the
    values depend on each other, and a load that falls behind slowly is only seen by how they drift."""
    size = len(values) // PARTS
    if not size:
        return 0.0
    parts = [percentile(values[part * size : (part + 1) * size], share) for part in range(PARTS)]
    return (limit - percentile(values, share)) / max(stdev(parts), 1e-9)


def settled(serve: Callable[[int], VerdictT]) -> VerdictT:
    """Serve requests, and more of them unless the verdict is sure."""
    for times in LONGER:
        made = serve(times)
        if made.sure:
            break
    return made


def least_queued(engines: Sequence[Replica], request: Arrival) -> int:
    """The replica with the fewest tokens of queued prompts, as the broker's `least_loaded`."""
    for engine in engines:
        engine.advance(request.at_s)
    return min(range(len(engines)), key=lambda i: engines[i].queued(request.at_s))


def power_of_two(rng: Random, dispatchers: int, every_s: float) -> Routing:
    """Of two random replicas with memory for all of the request, that with more to spare; if no replica has, of all: as
    the policy of this name without predictions of lengths. Each dispatcher knows what it has sent itself, and of all
    else what was reported last: reports are `every_s` seconds apart, which is the time between two reports of a worker
    and between two views of the monitor."""
    known: list[list[int]] = []
    next_s = 0.0

    def route(engines: Sequence[Replica], request: Arrival) -> int:
        nonlocal next_s
        if request.at_s >= next_s:
            for engine in engines:
                engine.advance(request.at_s)
            known[:] = ([engine.spare for engine in engines] for _ in range(dispatchers))
            next_s = request.at_s + every_s
        spare, tokens = rng.choice(known), request.prompt + request.output
        fits = [column for column, left in enumerate(spare) if left >= tokens]
        pair = rng.sample(fits, min(2, len(fits))) or range(len(spare))
        column = max(pair, key=spare.__getitem__)
        spare[column] -= tokens
        return column

    return route


def counted(served: Sequence[Each]) -> Sequence[Each]:
    """The requests of a run, in order of arrival, that the start and the end of it leave alone."""
    first, last = (int(share * len(served)) for share in COUNTED)
    return served[first : last + 1]


def _busy(made: CoupledOutcome) -> float:
    """Share of the time until the last arrival in which the instances compute."""
    until = made.served[-1].arrival_s
    spent = fsum(min(stop, until) - start for spans in made.busy for start, stop in spans if start < until)
    return spent / (until * len(made.busy))
