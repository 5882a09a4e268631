"""Which prefill instance a request goes to: the broker asks (paper, section 3.2: the global scheduler).

A policy answers with a column of the pool, None when the pool is empty. `work_s` are the predicted seconds of the
request's own prefill. No policy remembers anything: `pool.last` is kept by the pool's owner.
"""

from __future__ import annotations

from random import Random

from tetri.policy.views import PrefillPool


def least_loaded(work_s: float, pool: PrefillPool, rng: Random) -> int | None:
    """The prefill instance with the fewest predicted seconds of work before it, the first of equals (paper, section
    3.2, which leaves the measure open: seconds, since a count of requests or of tokens knows nothing of chunks that
    are padded or of work that grows with the square of a prompt)."""
    return pool.queued_s.index(min(pool.queued_s)) if pool.queued_s else None


def random(work_s: float, pool: PrefillPool, rng: Random) -> int | None:
    """Any prefill instance, each as likely."""
    return drawn(len(pool.queued_s), rng) if pool.queued_s else None


def round_robin(work_s: float, pool: PrefillPool, rng: Random) -> int | None:
    """The prefill instance after the last chosen one."""
    return (pool.last + 1) % len(pool.queued_s) if pool.queued_s else None


def drawn(columns: int, rng: Random) -> int:
    """One of so many columns, each as likely. `randrange` would take five times as long."""
    return int(rng.random() * columns)
