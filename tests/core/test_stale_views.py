"""A monitor that is silent: what is known of the loads ages, is forgotten, and nobody waits for it for ever."""

from __future__ import annotations

from tests.core.build import CAPACITY, identity, instance, membership, view
from tetri.core.instance.peers import Peers
from tetri.policy.views import Need


def made() -> tuple[Peers, Pool]:
    own = identity("p0", "prefill", view_s=2.0)
    peers = Peers(own)
    peers.update(membership(1, instance("p0", "prefill"), instance("d0", "decode")))
    peers.connected("d0")
    return peers, Pool(own, peers, lambda: None)


def free(pool: Pool) -> list[int]:
    pool.refresh()
    return pool.columns.free


def test_claims_that_no_view_can_contain_are_forgotten_with_the_last_view() -> None:
    peers, pool = made()
    assert peers.see(view(1, d0=4), 10.0)
    assert free(pool) == [4]
    pool.reserve(1, "d0", Need(3, 3, False))
    pool.granted(1, 10.1)
    assert free(pool) == [1]
    peers.expire(12.0)
    assert free(pool) == [1] and list(pool.reservations) == [1]
    peers.expire(12.1)  # nothing since: the request may be long over, and no report will ever say so
    assert free(pool) == [CAPACITY.blocks] and pool.reservations == {}
    pool.reserve(2, "d0", Need(3, 3, False))
    assert free(pool) == [CAPACITY.blocks - 3]  # what is still on its way counts
    assert peers.see(view(7, epoch=2, d0=5), 20.0)  # another monitor
    assert free(pool) == [5 - 3]


def test_a_view_in_time_is_kept() -> None:
    peers, pool = made()
    for number in range(1, 30):
        peers.see(view(number, d0=4), number * 1.0)
        peers.expire(number * 1.0 + 0.9)
    assert free(pool) == [4]
