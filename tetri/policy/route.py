"""Prefill routing policies: which prefill instance the broker assigns a request to (paper, section 3.2: the global
scheduler).

A policy returns a column of the pool, or None if the pool is empty. `work_s`: predicted seconds of the request's own
prefill. Policies are stateless: the pool's owner maintains `pool.last`.
"""

from __future__ import annotations

from math import inf
from random import Random

from tetri.policy.views import PrefillPool

IN_TIME = (0.5, 1.0)  # shares of the time that is left for the first token in which a prompt should be computed


def least_loaded(work_s: float, pool: PrefillPool, rng: Random) -> int | None:
    """The prefill instance with the fewest predicted seconds of queued work, on a tie the first. The paper (section
    3.2) leaves the measure open. Seconds account for padded chunks and for work that grows with the square of the
    prompt length; counts of requests or tokens do not."""
    return pool.queued_s.index(min(pool.queued_s)) if pool.queued_s else None


def adaptive(work_s: float, pool: PrefillPool, rng: Random) -> int | None:
    """Of the instances that are expected to compute the prompt in half of the time that is left, the one where it
    holds up the fewest for the least time: it waits until it is computed, and each request there for the work on it.
    Else of those in all of that time; if none is in time, the one that computes it first. An instance is expected to
    compute all work assigned to it in the share of its time that its decodes leave. Instances in fixed roles, and
    those that keep to prefill, count as having no requests: there a prompt delays no decode. Among fixed roles this is
    `least_loaded`. Not in the paper."""
    if not pool.iids:
        return None
    seconds = [(queued + work_s) / share for queued, share in zip(pool.queued_s, pool.share, strict=True)]
    first = min(seconds)
    for share in IN_TIME:
        in_time = share * pool.ttft_s
        if first < in_time:
            held_up = [
                each + work_s * requests if each < in_time else inf
                for each, requests in zip(seconds, pool.requests, strict=True)
            ]
            return held_up.index(min(held_up))
    return seconds.index(first)


def random(work_s: float, pool: PrefillPool, rng: Random) -> int | None:
    """A uniformly random prefill instance."""
    return drawn(len(pool.queued_s), rng) if pool.queued_s else None


def round_robin(work_s: float, pool: PrefillPool, rng: Random) -> int | None:
    """The prefill instance after the one chosen last."""
    return (pool.last + 1) % len(pool.queued_s) if pool.queued_s else None


def drawn(columns: int, rng: Random) -> int:
    """A uniformly random column. Five times as fast as `randrange`."""
    return int(rng.random() * columns)
