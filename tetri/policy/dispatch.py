"""Which decode instance a request goes to: a prefill instance's dispatcher asks (paper, section 3.3.4).

A policy answers with a column of the pool, None when no instance has room: `free` below the blocks that the request
has now. No policy remembers anything: `pool.last` is kept by the pool's owner.
"""

from __future__ import annotations

from random import Random

from tetri.policy.route import drawn
from tetri.policy.views import DecodePool, Need

DRAWS = 8  # columns drawn and tested before all are looked at once


def power_of_two(need: Need, pool: DecodePool, rng: Random) -> int | None:
    """The paper's dispatcher. Alpha are the instances whose `spare` blocks hold the request to its predicted end; two
    of them are drawn, each pair as likely, and of the two it goes where it interferes least: where fewer heavy decodes
    are, and among equals where more is spare. With alpha empty: of those that hold it now, the one with most spare, so
    that what must overcommit does so where it is least likely to preempt. Looks at a few columns while many have room,
    at all of them once otherwise.

    The paper wants "the lowest average ratio of heavy to light decodes", so that heavy ones are spread evenly, and
    compares instances with equally many requests, where that is the fewest heavy ones. Where numbers differ the ratio
    itself prefers a full instance with many light ones to an empty one: see `power_of_two_ratio`."""
    pair = _two_fitting(need, pool, rng)
    if not pair:
        return _most_spare(need, pool)
    return min(pair, key=lambda column: (pool.heavy[column], -pool.spare[column]))


def power_of_two_ratio(need: Need, pool: DecodePool, rng: Random) -> int | None:
    """As `power_of_two`, but of the two the one with the lower heavy : light ratio once the request is there (no light
    one: above any other), among equals the one with more spare. The paper's sentence to the letter, kept to be
    measured: with open arrivals it piles requests onto the instance that has most light ones."""
    pair = _two_fitting(need, pool, rng)
    if len(pair) < 2:
        return pair[0] if pair else _most_spare(need, pool)
    (heavy_a, light_a), (heavy_b, light_b) = (
        (pool.heavy[column] + need.heavy, pool.light[column] + (not need.heavy)) for column in pair
    )
    a, b = heavy_a * light_b, heavy_b * light_a  # the two ratios, each times both numbers of light ones
    if a == b:
        return max(pair, key=pool.spare.__getitem__)
    return pair[0] if a < b else pair[1]


def first_fit(need: Need, pool: DecodePool, rng: Random) -> int | None:
    """The first instance that has room."""
    return next((column for column, free in enumerate(pool.free) if free >= need.blocks), None)


def random(need: Need, pool: DecodePool, rng: Random) -> int | None:
    """Any instance with room, each as likely: the paper's rival (figure 19)."""
    for _ in range(DRAWS if pool.free else 0):
        column = drawn(len(pool.free), rng)
        if pool.free[column] >= need.blocks:
            return column
    return _any(_fitting(need, pool), rng)


def round_robin(need: Need, pool: DecodePool, rng: Random) -> int | None:
    """The first instance with room after the last chosen one."""
    columns = len(pool.free)
    turns = ((pool.last + turn) % columns for turn in range(1, columns + 1))
    return next((column for column in turns if pool.free[column] >= need.blocks), None)


def least_loaded(need: Need, pool: DecodePool, rng: Random) -> int | None:
    """Of the instances with room the one with the fewest requests, however long; among equals the one with more free
    blocks. Looks at all instances: it shows what power of two gives up by looking at two."""
    return min(
        _fitting(need, pool),
        key=lambda column: (pool.heavy[column] + pool.light[column], -pool.free[column]),
        default=None,
    )


def imbalance(need: Need, pool: DecodePool, rng: Random) -> int | None:
    """The paper's worst case (figure 19): heavy decodes always to the same instance, the first with room, and light
    ones to any other with room. To the first one too when it is all there is."""
    if need.heavy:
        return first_fit(need, pool, rng)
    fits = _fitting(need, pool)
    return _any([column for column in fits if column != 0] or fits, rng)


def _two_fitting(need: Need, pool: DecodePool, rng: Random) -> list[int]:
    """Two different columns of alpha, each pair as likely; fewer when alpha has fewer. Columns are drawn and tested
    until two are found; after a few draws alpha is small, and is written down in one pass."""
    blocks, end_blocks, free, spare = need.blocks, need.end_blocks, pool.free, pool.spare
    pair: list[int] = []
    for _ in range(DRAWS if free else 0):
        column = drawn(len(free), rng)
        if spare[column] >= end_blocks and free[column] >= blocks and column not in pair:
            pair.append(column)
            if len(pair) == 2:
                return pair
    if not free or max(spare) < end_blocks:
        return []  # told twice as fast as by the pass below
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
