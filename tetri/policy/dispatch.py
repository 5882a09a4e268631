"""Which decode instance a request goes to: a prefill instance's dispatcher asks (paper, section 3.3.4).

A policy answers with a column of the pool, None when no instance has room: `free` below the blocks that the request
has now. No policy remembers anything: `pool.last` is kept by the pool's owner.
"""

from __future__ import annotations

from random import Random

from tetri.policy.views import DecodePool, Need

DRAWS = 8  # columns drawn and tested before all are looked at once


def first_fit(need: Need, pool: DecodePool, rng: Random) -> int | None:
    """The first decode instance that has room for the request's KV blocks."""
    return next((column for column, free in enumerate(pool.free) if free >= need.blocks), None)


def power_of_two(need: Need, pool: DecodePool, rng: Random) -> int | None:
    """TODO"""
    return first_fit(need, pool, rng)
