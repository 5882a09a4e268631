"""Decode routing policies: which decode instance the dispatcher of a prefill instance offers a request (paper, section
3.3.4).

A policy returns a column of the pool, or None if no instance has enough free blocks for the request's current KV.
Policies are stateless: the pool's owner maintains `pool.last`.
"""

from __future__ import annotations

from random import Random

from tetri.policy.route import drawn
from tetri.policy.views import DecodePool, Need

DRAWS = 8  # random columns that are tested before all columns are scanned


def power_of_two(need: Need, pool: DecodePool, rng: Random) -> int | None:
    """The paper's dispatcher. The set alpha are the instances whose `spare` blocks hold the request until its predicted
    end. Two of them are drawn uniformly; the request goes to the one with fewer heavy decodes, on a tie to the one
    with more spare blocks. If alpha is empty, it goes to the instance with most spare blocks among those with enough
    free ones: overcommitment is then least likely to preempt. The policy tests a few columns while many have enough
    memory, otherwise it scans all once.

    The paper asks for "the lowest average ratio of heavy to light decodes" to spread heavy decodes evenly, and compares
    instances with equal numbers of requests, where that means the fewest heavy ones. With unequal numbers the ratio
    prefers a full instance with many light decodes to an empty one: see `power_of_two_ratio`."""
    pair = _two_fitting(need, pool, rng)
    if not pair:
        return _most_spare(need, pool)
    return min(pair, key=lambda column: (pool.heavy[column], -pool.spare[column]))


def power_of_two_ratio(need: Need, pool: DecodePool, rng: Random) -> int | None:
    """As `power_of_two`, but of the two instances it chooses the one with the lower ratio of heavy to light decodes,
    the new request included (without a light one the ratio is infinite), on a tie the one with more spare blocks. This
    is the paper's rule taken literally, kept for measurements: with open arrivals it piles requests onto the instance
    with most light decodes."""
    pair = _two_fitting(need, pool, rng)
    if len(pair) < 2:
        return pair[0] if pair else _most_spare(need, pool)
    (heavy_a, light_a), (heavy_b, light_b) = (
        (pool.heavy[column] + need.heavy, pool.light[column] + (not need.heavy)) for column in pair
    )
    a, b = heavy_a * light_b, heavy_b * light_a  # the two ratios, each multiplied by light_a * light_b
    if a == b:
        return max(pair, key=pool.spare.__getitem__)
    return pair[0] if a < b else pair[1]


def adaptive(need: Need, pool: DecodePool, rng: Random) -> int | None:
    """For an adaptive instance (role auto), not in the paper: the instance itself, if it has memory, since no KV moves
    then. Otherwise as `power_of_two`, but of the two the one with the shorter decode step. For any other instance as
    `power_of_two`."""
    if pool.home < 0:
        return power_of_two(need, pool, rng)
    if pool.free[pool.home] >= need.blocks:
        return pool.home
    pair = _two_fitting(need, pool, rng)
    return min(pair, key=pool.step_s.__getitem__) if pair else _most_spare(need, pool)


def first_fit(need: Need, pool: DecodePool, rng: Random) -> int | None:
    """The first instance with enough free blocks."""
    return next((column for column, free in enumerate(pool.free) if free >= need.blocks), None)


def random(need: Need, pool: DecodePool, rng: Random) -> int | None:
    """A uniformly random instance with enough free blocks: a baseline of the paper (figure 19)."""
    for _ in range(DRAWS if pool.free else 0):
        column = drawn(len(pool.free), rng)
        if pool.free[column] >= need.blocks:
            return column
    return _any(_fitting(need, pool), rng)


def round_robin(need: Need, pool: DecodePool, rng: Random) -> int | None:
    """The next instance with enough free blocks after the one chosen last."""
    columns = len(pool.free)
    turns = ((pool.last + turn) % columns for turn in range(1, columns + 1))
    return next((column for column in turns if pool.free[column] >= need.blocks), None)


def least_loaded(need: Need, pool: DecodePool, rng: Random) -> int | None:
    """Of the instances with enough free blocks, the one with the fewest requests, on a tie the one with more free
    blocks. It compares all instances, to show what `power_of_two` loses by comparing two."""
    fits = _fitting(need, pool)
    return min(fits, key=lambda column: (pool.heavy[column] + pool.light[column], -pool.free[column]), default=None)


def imbalance(need: Need, pool: DecodePool, rng: Random) -> int | None:
    """The paper's worst case (figure 19). Heavy decodes go to the first instance with enough free blocks, light ones
    to a random instance other than column 0, or to column 0 if no other has enough."""
    if need.heavy:
        return first_fit(need, pool, rng)
    fits = _fitting(need, pool)
    return _any([column for column in fits if column != 0] or fits, rng)


def least_deferred(pool: DecodePool, rng: Random) -> int | None:
    """Of two random instances, the one with more spare blocks, less all that it has deferred. For a request that no
    instance has memory for now; not one of the paper's policies. Not the best of all: until the next view, each
    dispatcher would choose the same one. None if every instance has deferred as much as it may."""
    may = [column for column, free in enumerate(pool.free) if free + pool.most[column] > 0]
    return max(rng.sample(may, min(len(may), 2)), key=pool.spare.__getitem__, default=None)


def _two_fitting(need: Need, pool: DecodePool, rng: Random) -> list[int]:
    """Two different columns of alpha, drawn uniformly; fewer if alpha has fewer. Random columns are tested until two
    are found. If DRAWS are not enough, alpha is small and is listed in one scan."""
    blocks, end_blocks, free, spare = need.blocks, need.end_blocks, pool.free, pool.spare
    pair: list[int] = []
    for _ in range(DRAWS if free else 0):
        column = drawn(len(free), rng)
        if spare[column] >= end_blocks and free[column] >= blocks and column not in pair:
            pair.append(column)
            if len(pair) == 2:
                return pair
    if not free or max(spare) < end_blocks:
        return []  # twice as fast as the scan below
    alpha = [column for column, left in enumerate(spare) if left >= end_blocks and free[column] >= blocks]
    return alpha if len(alpha) < 2 else rng.sample(alpha, 2)


def _most_spare(need: Need, pool: DecodePool) -> int | None:
    best, most = None, 0
    for column, left in enumerate(pool.spare):
        if (best is None or left > most) and pool.free[column] >= need.blocks:
            best, most = column, left
    return best


def _fitting(need: Need, pool: DecodePool) -> list[int]:
    return [column for column, free in enumerate(pool.free) if free >= need.blocks]


def _any(columns: list[int], rng: Random) -> int | None:
    return columns[drawn(len(columns), rng)] if columns else None
