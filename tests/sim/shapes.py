"""Simulated deployments with faults: what they are made of and what goes wrong in them, all drawn from a seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from tetri.core.actions import LengthKnown, Predict
from tetri.cost import Cost
from tetri.engine_request import HiddenStateEstimate, StepDone
from tetri.instance import Capacity
from tetri.policy.rules import ADMISSIONS, DECODE_ROUTES, FLIPS, ORDERS, PREFILL_ROUTES, Rules
from tetri.policy.views import FlipSettings
from tetri.request import Expected, LengthDistribution, LengthRange, Sampling, blocks_for
from tetri.sim.faulty.chance import Faults
from tetri.sim.faulty.processes import FaultyPredictor
from tetri.sim.faulty.world import FaultyWorld
from tetri.sim.setup import Setup, Timeouts
from tetri.sim.traces import Arrival

PREDICTORS = ("classifier", "hidden", "both", "prior")
HOME = (("local",),)
FAR = (("stream",), ("stream",), ("local", "stream"))  # any two have one in common
WIDE = LengthDistribution(2, (0.1,) * 10)  # what is known of lengths before any has come
FIRST_S = 1.0  # in which faults happen; requests come in the first half of it


def cost(step_s: float) -> Cost:
    """A pass takes `step_s`, and three times as long with 16 tokens."""
    table = ((1.0, step_s), (16.0, 3 * step_s))
    return Cost(prefill=table, decode=table, kv_token_bytes=1)


# A monitor that was restarted when nobody was left for a role takes 45 s to give it to somebody.
SETUP = Setup(
    cost=cost(0.002),
    link_latency_s=0.001,
    link_bytes_s=2000.0,
    flip_settings=FlipSettings(idle_s=0.05, low_s=0.1, hold_s=0.1, floor=1, gain=1.5),
    load_s=0.02,
    stale_s=0.1,
    heartbeat_s=0.05,
    warm_s=0.0,
    stall_s=100.0,
    limit_s=55.0,
    timeouts=Timeouts(dead_s=0.6, gone_s=0.4, offer_s=0.08, view_s=1.2, patience_s=60.0, client_grace_s=2.5, ask_s=0.4),
)
# One instance for each phase, which serve a request at a time.
ONE = replace(
    SETUP,
    prefill=1,
    decode=1,
    kv_tokens=64,
    block_tokens=4,
    chunk_tokens=8,
    max_batch=4,
    context=40,
    slots=8,
    stream_interval=1,
    kv_paths=HOME,
)


@dataclass(frozen=True)
class Shape:
    """A deployment and how many requests it gets. Small, so that every limit is met."""

    setup: Setup
    requests: int

    def but(self, **changes: Any) -> Shape:
        """The same with another setup."""
        return replace(self, setup=replace(self.setup, **changes))

    def learning(self, kind: str, **changes: Any) -> Shape:
        """The same, where lengths are learnt, and predicted by this kind at first."""
        rules = replace(self.setup.rules, length="trained", length_granularity=4, **changes)
        return self.but(expected=Expected(kind, WIDE), rules=rules)

    def arrivals(self, seed: int) -> list[Arrival]:
        rng = Random(f"arrivals {seed}")
        made = [_arrival(rng, self.setup.context) for _ in range(self.requests)]
        return sorted(made, key=lambda arrival: arrival.at_s)

    def choosing(self, seed: int) -> list[Arrival]:
        """The arrivals, of which some ask for several choices, as many as an instance can begin, or log
        probabilities."""
        rng, capacity = Random(f"choices {seed}"), self.setup.capacity()
        return [_choosing(rng, each, capacity) for each in self.arrivals(seed)]


def _arrival(rng: Random, context: int) -> Arrival:
    prompt = rng.randint(1, context - 1)
    output, drawn = rng.randint(1, min(context - prompt, 16)), rng.random() < 0.3
    sampling = Sampling(
        max_tokens=output,
        temperature=0.7 if drawn else 0.0,
        seed=rng.getrandbits(20) if drawn else None,
        stop=rng.choice(([], [], ["A", "!\u001f"], ["7"])),
        ignore_eos=rng.random() < 0.5,
        min_tokens=min(output, 4) if drawn else 0,
    )
    deadline_s = rng.choice((None, None, None, 3.0))
    return Arrival(rng.uniform(0.0, FIRST_S / 2), prompt, output, deadline_s, sampling=sampling)


def _choosing(rng: Random, arrival: Arrival, capacity: Capacity) -> Arrival:
    sampling = arrival.sampling
    assert sampling is not None
    sampling = sampling.changed(logprobs=rng.choice((None, None, 0, 3)))
    copies = min(capacity.max_batch, capacity.blocks // blocks_for(arrival.prompt, capacity.block_tokens))
    n = min(rng.choice((1, 2, 3, 5)), copies)
    if n > 1:
        sampling = sampling.changed(temperature=0.7, seed=rng.getrandbits(20))
    return replace(arrival, sampling=sampling, n=n)


ODDS = {"drop": (0.02, 0.2, 0.2), "duplicate": (0.02, 0.2), "delay": (0.05, 0.3), "corrupt": (0.05, 0.4)}
ODDS |= {"kill": (0.5, 2.0), "disconnect": (0.2, 3.0), "leave": (0.5, 2.0), "stall": (0.5, 2.0), "cancel": (0.1, 0.4)}
ODDS |= {"flip": (3.0, 15.0), "kill_monitor": (1.0, 3.0), "mute": (0.2, 1.0), "lose": (0.05, 0.3)}
ODDS |= {"truncate": (0.05, 0.3), "replay": (0.05, 0.4), "overtake": (0.05, 0.4), "mangle": (0.02, 0.1)}
ODDS |= {"freeze": (0.3, 1.0), "migrate": (5.0, 50.0)}


def some_faults(seed: int) -> Faults:
    """Some kinds of faults, each hardly ever or often."""
    rng = Random(f"faults {seed}")
    return Faults(until=FIRST_S, **{kind: rng.choice((0.0, *odds)) for kind, odds in ODDS.items()})


def some_shape(seed: int) -> Shape:
    rng = Random(f"shape {seed}")
    block_tokens, chunk_tokens = rng.choice((1, 2, 4)), rng.choice((4, 8, 16))
    context = rng.choice((16, 40))
    setup = replace(
        SETUP,
        seed=seed,
        prefill=rng.choice((1, 2, 2, 3)),
        decode=rng.choice((1, 2, 2, 3)),
        mixed=rng.choice((0, 0, 1)),
        block_tokens=block_tokens,
        kv_tokens=(-(-context // block_tokens) + rng.choice((0, 2, 8, 40))) * block_tokens,
        chunk_tokens=chunk_tokens,
        max_batch=min(rng.choice((1, 2, 4, 8)), chunk_tokens - 1),
        context=context,
        slots=_blocks_of_a_chunk(chunk_tokens, block_tokens) + rng.choice((0, 1, 4, 30)),
        reserve_share=rng.choice((0.2, 0.5, 1.0)),
        stream_interval=rng.choice((1, 1, 3, 32)),
        rules=_rules(rng),
        flip=rng.choice((*FLIPS,)),
        kv_paths=rng.choice((HOME, FAR, FAR)),
        cost=cost(rng.choice((0.002, 0.004, 0.008))),
    )
    shape = Shape(_doing_both(seed, setup), rng.choice((3, 6, 10)))
    rng = Random(f"lengths {seed}")
    if rng.random() < 0.5:
        return shape
    return shape.learning(rng.choice(PREDICTORS), length_cover=rng.choice((0.0, 0.8)))


def tight_shape(seed: int) -> Shape:
    """Hardly more slots than one chunk may fill, hardly more memory than one request may take, and more prefill
    instances than decode instances, or instances that do both. Those that would have to decode their own prompts, with
    nobody else to do it, have slots for a whole one."""
    rng, shape = Random(f"tight {seed}"), some_shape(seed)
    setup = shape.setup
    chunk = _blocks_of_a_chunk(setup.chunk_tokens, setup.block_tokens)
    whole = -(-setup.context // setup.block_tokens)
    roles = ((2, 1, 0), (4, 1, 0), (3, 2, 0), (1, 0, 1), (0, 0, 1), (0, 0, 2), (2, 0, 2), (1, 1, 1), (4, 1, 1))
    prefill, decode, mixed = rng.choice(roles)
    slots = chunk + rng.choice((0, 0, 1, 2, chunk, 3 * chunk))
    requests, spare = rng.choice((6, 12, 24)), rng.choice((0, 0, 1, 2, 4))
    auto = rng.randint(0, mixed)
    return replace(shape, requests=requests).but(
        prefill=prefill,
        decode=decode,
        mixed=mixed - auto,
        auto=auto,
        kv_tokens=(whole + spare) * setup.block_tokens,
        slots=max(slots, chunk + whole) if mixed and decode + mixed == 1 else slots,
        flip="none",
    )


def _doing_both(seed: int, setup: Setup) -> Setup:
    """Some of the instances that do both are in the role auto, and some deployments have no others."""
    rng = Random(f"both {seed}")
    if rng.random() < 0.8:
        auto = rng.randint(0, setup.mixed)
        return replace(setup, mixed=setup.mixed - auto, auto=auto)
    mixed, auto = rng.choice(((0, 1), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3)))
    alone = _blocks_of_a_chunk(setup.chunk_tokens, setup.block_tokens) - (-setup.context // setup.block_tokens)
    slots = max(setup.slots, alone) if mixed + auto == 1 else setup.slots
    return replace(setup, prefill=0, decode=0, mixed=mixed, auto=auto, slots=slots)


def _blocks_of_a_chunk(chunk_tokens: int, block_tokens: int) -> int:
    return -(-(chunk_tokens + block_tokens - 1) // block_tokens)


def _rules(rng: Random) -> Rules:
    """Any of the policies."""
    return Rules(
        prefill_route=rng.choice((*PREFILL_ROUTES,)),
        decode_route=rng.choice((*DECODE_ROUTES,)),
        order=rng.choice((*ORDERS,)),
        admit=rng.choice((*ADMISSIONS,)),
        length=rng.choice(("none", "noisy")),
        sched_batch=rng.choice((1, 3, 16)),
        dispatch_end=rng.choice(("low", "middle", "high")),
        admit_end=rng.choice(("low", "middle", "high")),
        heavy_tokens=8,
        length_wait_s=rng.choice((0.03, 0.2)),
    )


def some_odds(rng: Random) -> LengthDistribution:
    """Nearly sure of anything, or of nothing."""
    bucket, sure = rng.randrange(5), rng.choice((0.9, 0.2))
    return LengthDistribution(4, tuple(sure if place == bucket else (1.0 - sure) / 4 for place in range(5)))


class WildPredictor(FaultyPredictor):
    """Says anything: sometimes that nobody can say, sometimes it is far off, sometimes it takes a while."""

    def predict(self, wanted: Predict) -> LengthKnown | None:
        rng = self.chance.rng
        low = max(0, wanted.sampling.max_tokens + rng.randint(-8, 4))
        known = LengthKnown(wanted.key, rng.choice((None, LengthRange(low=low, high=low + rng.randint(1, 8)))))
        if self.own.expected is not None:
            known = LengthKnown(wanted.key, None, rng.choice((None, some_odds(rng), some_odds(rng))))
        if rng.random() < 0.3:
            return known
        if not self.chance.happens("mute"):
            self.chance.after(0.05, self.receive, known)
        return None

    def estimates(self, done: StepDone) -> StepDone:
        if self.own.expected is None or self.own.expected.kind not in ("hidden", "both"):
            return done
        return done.changed(estimates=tuple(self._estimated(done)))

    def _estimated(self, done: StepDone) -> Iterator[HiddenStateEstimate]:
        """Mostly of prompts that have ended, now and then of decodes."""
        rng, core = self.chance.rng, self.worker.core
        for sampled in done.tokens:
            if (prompt := core.prefill.requests.get(sampled.key)) is not None:
                chance, outputs = 0.8, len(prompt.output)
            elif (decode := core.decode.requests.get(sampled.key)) is not None:
                chance, outputs = 0.2, decode.written
            else:
                continue  # the first token of a sibling
            if rng.random() < chance and not self.chance.happens("mute"):
                yield HiddenStateEstimate(sampled.key, outputs, some_odds(rng))


def story(seed: int, faults: Faults, shape: Shape, log: list[str] | None = None) -> FaultyWorld:
    """The world after its run. Raises PromiseBroken."""
    world = FaultyWorld(shape.setup, shape.choosing(seed), faults, log=log, predictor=WildPredictor)
    world.run()
    assert all(outcome.state != "refused" for outcome in world.clients.outcomes), f"seed {seed}: refused"
    return world


def tell(seed: int) -> str:
    """The whole story of a seed, to look for what went wrong."""
    log: list[str] = []
    try:
        story(seed, some_faults(seed), some_shape(seed), log)
    except ValueError as error:
        log.append(str(error))
    return "\n".join(log)
