"""The decode instances as one dispatcher sees them."""

from random import Random

import pytest

from tests.core.build import CAPACITY, capacity, fingerprint, identity, instance, membership
from tetri.core.instance.peers import Peers
from tetri.core.prefill.request import KVOutflow, PrefillRequest
from tetri.policy.rules import Rules
from tetri.policy.views import Need, QueuedPrompt
from tetri.request import Sampling
from tetri.wire.messages import ClusterView, InstanceLoad, Load


class World:
    """A pool, its neighbours, and the load at home."""

    def __init__(self, *decoders, **changes):
        own = identity("p1", "prefill", **{"rules": Rules(decode_route="first_fit"), **changes})
        self.peers, self.home, self.number = Peers(own), None, 0
        self.pool = Pool(own, self.peers, lambda: self.home)
        self.membership(*(decoders or (instance("d1", "decode"), instance("d2", "decode"))))

    def membership(self, *instances):
        self.number += 1
        self.peers.update(membership(self.number, *instances))
        for each in instances:
            self.peers.connected(each.iid)
        self.pool.refresh()

    def view(self, now, age=0.0, incarnation=1, **loads):
        self.number += 1
        told = [InstanceLoad(iid, incarnation, "decode", age, load) for iid, load in loads.items()]
        self.peers.see(ClusterView(epoch=1, number=self.number, loads=told), now)
        self.pool.refresh()

    def columns(self):
        pool = self.pool.columns
        return list(zip(pool.iids, pool.free, pool.spare, pool.heavy, pool.light, strict=True))

    def choose(self, blocks=1, refused=(), tokens=4, most=8):
        sampling = Sampling(max_tokens=most)
        prompt = (1,) * tokens
        request = PrefillRequest(
            "p:a:1", "a", 1, prompt, (), sampling, QueuedPrompt("p:a:1", 1, tokens), KVOutflow(blocks), tokens
        )
        assert self.pool.fits(request) == bool(set(self.pool.columns.iids) - set(self._unfit(request)))
        return self.pool.choose(request, Need(blocks, blocks, False), refused, Random(1))

    def _unfit(self, request):
        return [self.pool.columns.iids[column] for column in self.pool._unfit(request)]


def test_who_has_not_reported_counts_as_empty_and_an_earlier_incarnation_is_another():
    world = World()
    assert world.columns() == [("d1", 10, 10, 0, 0), ("d2", 10, 10, 0, 0)]
    world.view(1.0, d1=Load(free_blocks=7, growth_blocks=3, waiting=2, running=3, heavy=1), d9=Load(free_blocks=1))
    assert world.columns() == [("d1", 7, 4, 1, 4), ("d2", 10, 10, 0, 0)]
    world.view(2.0, incarnation=2, d1=Load(free_blocks=1))
    assert world.columns()[0] == ("d1", 10, 10, 0, 0)


def test_only_those_that_decode_can_be_reached_and_speak_the_same():
    world = World(
        instance("d1", "decode"),
        instance("m1", "mixed"),
        instance("p2", "prefill"),
        instance("x1", "decode", fingerprint=fingerprint(dtype="f32")),
    )
    assert [column[0] for column in world.columns()] == ["d1", "m1"]
    world.peers.disconnected("d1")
    world.pool.refresh()
    assert [column[0] for column in world.columns()] == ["m1"]


def test_columns_are_kept_until_there_is_news():
    world = World()
    free = world.pool.columns.free
    world.pool.reserve(1, "d1", Need(2, 3, False))
    world.pool.refresh()
    assert world.pool.columns.free is free and world.columns()[0] == ("d1", 8, 7, 0, 1)


@pytest.mark.parametrize(
    "granted_at, age, counted",
    [(None, 0.0, True), (1.0, 0.0, False), (1.0, 1.5, True), (2.5, 0.0, True)],
    ids=["not granted", "before the report", "after an old report", "after the view"],
)
def test_an_own_offer_counts_until_a_report_was_made_after_its_grant(granted_at, age, counted):
    world = World()
    world.pool.reserve(1, "d1", Need(2, 3, True))
    if granted_at is not None:
        world.pool.granted(1, granted_at)
        world.pool.granted(1, 9.0)  # said again
    world.view(2.0, age=age, d1=Load(free_blocks=9, heavy=0))
    assert world.columns()[0] == (("d1", 7, 6, 1, 0) if counted else ("d1", 9, 9, 0, 0))
    assert bool(world.pool.reservations) == counted
    world.pool.granted(7, 1.0)  # of an offer that no longer counts


def test_what_is_granted_by_one_who_never_reports_is_forgotten_at_the_next_news():
    world = World()
    world.pool.reserve(1, "d1", Need(2, 3, False))
    world.pool.granted(1, 1.0)
    world.view(2.0, d2=Load(free_blocks=9))
    assert world.columns()[0] == ("d1", 10, 10, 0, 0)


def test_what_is_taken_back_no_longer_counts():
    world = World()
    world.pool.reserve(1, "d1", Need(2, 3, True))
    world.pool.withdrawn(1)
    world.pool.withdrawn(1)
    assert world.columns()[0] == ("d1", 10, 10, 0, 0)


def test_who_refused_has_no_room_for_as_much_until_the_next_report():
    world = World()
    world.pool.reserve(1, "d1", Need(4, 6, False))
    world.pool.refused(1)
    world.pool.refused(1)
    assert world.columns()[0] == ("d1", 3, 3, 0, 0)
    assert (world.choose(blocks=4), world.choose(blocks=3)) == ("d2", "d1")
    world.view(1.0, d1=Load(free_blocks=8))
    assert world.choose(blocks=4) == "d1"


def test_an_offer_to_one_that_is_gone_changes_nothing():
    world = World()
    for number in (1, 2):
        world.pool.reserve(number, "d1", Need(2, 3, True))
    world.membership(instance("d2", "decode"))
    world.pool.withdrawn(1)
    world.pool.refused(2)
    assert world.columns() == [("d2", 10, 10, 0, 0)] and not world.pool.reservations


def test_who_refused_this_job_is_left_out_for_it_alone():
    world = World()
    assert world.choose() == "d1" and world.choose(refused=("d1", "gone")) == "d2"
    assert world.choose(refused=("d1", "d2")) is None and world.columns()[0][1] == 10


def test_who_can_never_hold_a_job_is_left_out():
    small = capacity(blocks=4, context=30)
    world = World(instance("d1", "decode", capacity=small), instance("d2", "decode"))
    assert world.choose(most=12) == "d1" and world.choose(most=13) == "d2"  # 17 tokens take five blocks
    assert world.choose(tokens=29, most=1, blocks=8) == "d2"
    assert world.choose(most=40) is None


def test_the_last_choice_is_kept_for_round_robin_while_it_is_there():
    world = World(rules=Rules(decode_route="round_robin"))
    assert [world.choose() for _ in range(3)] == ["d1", "d2", "d1"]
    world.membership(instance("d0", "decode"), instance("d1", "decode"), instance("d2", "decode"))
    assert world.choose() == "d2"
    world.membership(instance("d0", "decode"), instance("d1", "decode"))
    assert world.choose() == "d0"


# ---------------------------------------------------------------- at home


def test_home_is_a_column_while_it_decodes_and_never_stale():
    world = World()
    world.home = Load(free_blocks=6, growth_blocks=1, waiting=1)
    world.pool.refresh()
    assert world.columns()[-1] == ("p1", 6, 5, 0, 1)
    world.pool.reserve(1, "p1", Need(2, 3, True))
    assert world.columns()[-1] == ("p1", 4, 2, 1, 1) and not world.pool.reservations
    world.pool.refresh()
    assert world.columns()[-1] == ("p1", 6, 5, 0, 1)  # as it says itself, the offer included once it is granted
    world.home = None
    world.pool.refresh()
    assert [column[0] for column in world.columns()] == ["d1", "d2"]


@pytest.mark.parametrize("slots, fits", [(8, False), (9, True)])  # three of them are the reserve
def test_at_home_a_prompt_must_fit_twice_or_wholly_into_the_open_slots(slots, fits):
    world = World(instance("p2", "prefill"), slots=slots)
    world.home = Load(free_blocks=CAPACITY.blocks)
    world.pool.refresh()
    assert world.choose(tokens=20, blocks=5) == "p1"
    assert (world.choose(tokens=24, blocks=6) == "p1") == fits
