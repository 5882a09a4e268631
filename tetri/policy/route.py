"""Prefill routing policies: which prefill instance the broker assigns a request to (paper, section 3.2: the global
scheduler).

A policy returns a column of the pool, or None if the pool is empty. `work_s`: predicted seconds of the request's own
prefill. Policies are stateless: the pool's owner maintains `pool.last`.
"""

from __future__ import annotations

from math import inf, nextafter
from random import Random

from tetri.policy.views import PrefillPool

IN_TIME = (0.5, 1.0)  # shares of the time that is left for the first token in which a prompt should be computed


def least_loaded(work_s: float, pool: PrefillPool, rng: Random) -> int | None:
    """The prefill instance with the fewest predicted seconds of queued work, on a tie the first. The paper (section
    3.2) leaves the measure open. Seconds account for padded chunks and for work that grows with the square of the
    prompt length; counts of requests or tokens do not."""
    return pool.queued_s.index(min(pool.queued_s)) if pool.queued_s else None


def adaptive(work_s: float, pool: PrefillPool, rng: Random) -> int | None:
    """Of the instances that are expected to compute the prompt in half of the time that is left, the one with the
    fewest requests, of these the one that computes it first; else of those in all of that time; if none is in time,
    the one that computes it first; without a limit, of those that do the one with the fewest requests. An instance
    is expected to compute all work assigned to it in the share of its time that its decodes leave. Instances in
    fixed roles, and those that keep to prefill, count as having no requests: there a prompt delays no decode. Among
    fixed roles this is `least_loaded`. Not in the paper."""
    if not pool.groups:
        return least_loaded(work_s, pool, rng)
    seconds = [(queued + work_s) / share for queued, share in zip(pool.queued_s, pool.share, strict=True)]
    first = min(seconds)
    limits = [share * pool.ttft_s for share in IN_TIME] if pool.ttft_s < inf else [nextafter(first, inf)]
    for in_time in limits:
        for requests in sorted(pool.groups) if first < in_time else ():
            column = min(pool.groups[requests], key=seconds.__getitem__)
            if seconds[column] < in_time:
                return column
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
