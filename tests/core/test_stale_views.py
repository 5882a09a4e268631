"""A monitor that is silent: what is known of the loads ages, is forgotten, and nobody waits for it for ever."""

from __future__ import annotations

from tests.core.build import CAPACITY, identity, instance, roster, view
from tetri.core.peers import Neighbours
from tetri.core.pool import Pool
from tetri.policy.views import Need


def made() -> tuple[Neighbours, Pool]:
    own = identity("p0", "prefill", view_s=2.0)
    neighbours = Neighbours(own)
    neighbours.update(roster(1, instance("p0", "prefill"), instance("d0", "decode")))
    neighbours.connected("d0")
    return neighbours, Pool(own, neighbours, lambda: None)


def free(pool: Pool) -> list[int]:
    pool.refresh()
    return pool.columns.free


def test_claims_that_no_view_can_contain_are_forgotten_with_the_last_view() -> None:
    neighbours, pool = made()
    assert neighbours.see(view(1, d0=4), 10.0)
    assert free(pool) == [4]
    pool.claim(1, "d0", Need(3, 3, False))
    pool.granted(1, 10.1)
    assert free(pool) == [1]
    neighbours.expire(12.0)
    assert free(pool) == [1] and list(pool.claims) == [1]
    neighbours.expire(12.1)  # nothing since: the request may be long over, and no report will ever say so
    assert free(pool) == [CAPACITY.blocks] and pool.claims == {}
    pool.claim(2, "d0", Need(3, 3, False))
    assert free(pool) == [CAPACITY.blocks - 3]  # what is still on its way counts
    assert neighbours.see(view(7, epoch=2, d0=5), 20.0)  # another monitor
    assert free(pool) == [5 - 3]


def test_a_view_in_time_is_kept() -> None:
    neighbours, pool = made()
    for number in range(1, 30):
        neighbours.see(view(number, d0=4), number * 1.0)
        neighbours.expire(number * 1.0 + 0.9)
    assert free(pool) == [4]
