"""What a virtual cluster (tests/core/cluster.py) is made of, and what goes wrong in it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random
from typing import Any

from tetri.cost import Cost
from tetri.policy.rules import ADMISSIONS, DECODE_ROUTES, FLIPS, ORDERS, PREFILL_ROUTES, Rules

ROLES = ("prefill", "decode", "mixed")
PREDICTORS = ("classifier", "hidden", "both", "prior")


@dataclass(frozen=True)
class Faults:
    """Chances, per message or per second of virtual time and thing; all end at `until`."""

    until: float = 1.0
    drop: float = 0.0
    repeat: float = 0.0
    delay: float = 0.0  # of a message that takes up to `longest_delay`
    longest_delay: float = 0.2
    corrupt: float = 0.0  # of a chunk's copy
    kills: float = 0.0
    blips: float = 0.0  # of each link
    away: float = 0.0  # of each client
    stuck: float = 0.0  # of each client
    cancels: float = 0.0  # of each request, in all
    flips: float = 0.0  # asked for by hand
    monitor_kills: float = 0.0
    mute: float = 0.0  # of each prediction: it never comes
    lose: float = 0.0  # of a chunk's copy
    shorten: float = 0.0  # of a chunk's copy
    replay: float = 0.0  # of a message between workers: an older one comes once more
    overtake: float = 0.0  # of a message between workers: it comes early, and once more in its place
    mangle: float = 0.0  # of a chunk that is announced

    @classmethod
    def some(cls, seed: int) -> Faults:
        """Some kinds of faults, each hardly ever or often."""
        rng = Random(f"faults {seed}")

        def chance(*values: float) -> float:
            return rng.choice((0.0, *values))

        return cls(
            drop=chance(0.02, 0.2),
            repeat=chance(0.02, 0.2),
            delay=chance(0.05, 0.3),
            corrupt=chance(0.05, 0.4),
            kills=chance(0.5, 2.0),
            blips=chance(0.2, 1.0),
            away=chance(0.5, 2.0),
            stuck=chance(0.5, 2.0),
            cancels=chance(0.1, 0.4),
            flips=chance(3.0, 15.0),
            monitor_kills=chance(1.0, 3.0),
            mute=chance(0.2, 1.0),
            lose=chance(0.05, 0.3),
            shorten=chance(0.05, 0.3),
            replay=chance(0.05, 0.4),
            overtake=chance(0.05, 0.4),
            mangle=chance(0.02, 0.1),
        )


@dataclass(frozen=True)
class Shape:
    """How big everything is. Small, so that every limit is met."""

    prefills: int = 2
    decodes: int = 2
    mixed: int = 0
    requests: int = 8
    blocks: int = 16
    block_tokens: int = 4
    chunk_tokens: int = 8
    max_batch: int = 4
    context: int = 40
    slots: int = 8
    reserve_share: float = 0.5
    stream_interval: int = 1
    far: bool = False  # KV may come over a path that takes time
    rules: Rules = Rules()
    expects: str = ""  # the kind of what predicts lengths, where these are learnt
    flip: str = "none"
    cost: Cost = Cost(prefill=((1.0, 0.001), (16.0, 0.002)), decode=((1.0, 0.001), (16.0, 0.002)))

    @classmethod
    def some(cls, seed: int) -> Shape:
        rng = Random(f"shape {seed}")
        block_tokens, chunk_tokens = rng.choice((1, 2, 4)), rng.choice((4, 8, 16))
        fewest_slots = -(-(chunk_tokens + block_tokens - 1) // block_tokens)
        context = rng.choice((16, 40))
        shape = cls(
            prefills=rng.choice((1, 2, 2, 3)),
            decodes=rng.choice((1, 2, 2, 3)),
            mixed=rng.choice((0, 0, 1)),
            requests=rng.choice((3, 6, 10)),
            blocks=-(-context // block_tokens) + rng.choice((0, 2, 8, 40)),
            block_tokens=block_tokens,
            chunk_tokens=chunk_tokens,
            max_batch=min(rng.choice((1, 2, 4, 8)), chunk_tokens - 1),
            context=context,
            slots=fewest_slots + rng.choice((0, 1, 4, 30)),
            reserve_share=rng.choice((0.2, 0.5, 1.0)),
            stream_interval=rng.choice((1, 1, 3, 32)),
            rules=_rules(rng),
            flip=rng.choice((*FLIPS,)),
            far=rng.choice((False, True, True)),
        )
        rng = Random(f"lengths {seed}")
        if rng.random() < 0.5:
            return shape
        return shape.learning(rng.choice(PREDICTORS), length_cover=rng.choice((0.0, 0.8)))

    def learning(self, expects: str, **changes: Any) -> Shape:
        """The same, where lengths are learnt, and predicted by this kind at first."""
        rules = replace(self.rules, length="trained", length_granularity=4, **changes)
        return replace(self, expects=expects, rules=rules)

    @classmethod
    def tight(cls, seed: int) -> Shape:
        """Hardly more slots than one chunk may fill, hardly more memory than one request may take, and more prefill
        instances than decode instances, or instances that do both. Those that would have to decode their own prompts,
        with nobody else to do it, have slots for a whole one."""
        rng, shape = Random(f"tight {seed}"), cls.some(seed)
        chunk = -(-(shape.chunk_tokens + shape.block_tokens - 1) // shape.block_tokens)
        whole = -(-shape.context // shape.block_tokens)
        roles = ((2, 1, 0), (4, 1, 0), (3, 2, 0), (1, 0, 1), (0, 0, 1), (0, 0, 2), (2, 0, 2), (1, 1, 1), (4, 1, 1))
        prefills, decodes, mixed = rng.choice(roles)
        slots = chunk + rng.choice((0, 0, 1, 2, chunk, 3 * chunk))
        return replace(
            shape,
            prefills=prefills,
            decodes=decodes,
            mixed=mixed,
            requests=rng.choice((6, 12, 24)),
            blocks=whole + rng.choice((0, 0, 1, 2, 4)),
            slots=max(slots, chunk + whole) if mixed and decodes + mixed == 1 else slots,
            flip="none",
        )


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
