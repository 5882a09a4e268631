"""The decode instances as one dispatcher sees them."""

from random import Random

import pytest

from tests.core.build import CAPACITY, assign, capacity, identity, instance, membership, prefill_request
from tetri.core.instance.peers import Peers
from tetri.core.prefill.decode_pool import LivePool
from tetri.policy.rules import Rules
from tetri.policy.views import Need
from tetri.wire.load import Load
from tetri.wire.messages import ClusterView, InstanceLoad

EMPTY = (10, 10, 0, 0)
BOTH = (instance("d1", "decode"), instance("d2", "decode"))


class World:
    """A pool, its neighbours, and the load at home."""

    def __init__(self, *decoders, **changes):
        own = identity("p1", "prefill", **changes)
        self.peers, self.home, self.number = Peers(own), None, 0
        self.pool = LivePool(own, self.peers)
        self.pool.home = self
        self.membership(*(decoders or BOTH))

    def load(self):
        return self.home

    def adapts(self):
        return False

    def membership(self, *instances):
        self.number += 1
        self.peers.update(membership(self.number, *instances))
        for each in instances:
            self.peers.connected(each.iid)

    def view(self, now, age=0.0, incarnation=1, epoch=1, keeps=(), **loads):
        self.number += 1
        told = [InstanceLoad(iid, incarnation, "decode", age, load) for iid, load in loads.items()]
        kept = dict.fromkeys(keeps, "prefill")
        self.peers.see(ClusterView(epoch=epoch, number=self.number, loads=told, keeps=kept), now)

    def columns(self):
        """Free blocks, those that will stay free, and heavy and light requests, by instance."""
        self.pool.refresh()
        pool = self.pool.columns
        return dict(zip(pool.iids, zip(pool.free, pool.spare, pool.heavy, pool.light, strict=True), strict=True))

    def reserve(self, number=1, iid="d1", blocks=2, end_blocks=3, heavy=False):
        self.pool.refresh()
        self.pool.reserve(number, iid, Need(blocks, end_blocks, heavy))

    def choose(self, blocks=1, refused=(), tokens=4, most=8):
        self.pool.refresh()
        made = prefill_request(assign("a", tokens, max_tokens=most))
        chosen = self.pool.choose(made, Need(blocks, blocks, False), refused, Random(1))
        assert chosen is None or self.pool.fits(made)
        return chosen

    def later(self, *refused, tokens=4, most=8):
        self.pool.refresh()
        return self.pool.choose_later(prefill_request(assign("a", tokens, max_tokens=most)), refused, Random(1))


@pytest.fixture
def world():
    return World()


def test_who_has_not_reported_counts_as_empty_and_an_earlier_incarnation_is_another(world):
    assert world.columns() == {"d1": EMPTY, "d2": EMPTY}
    world.view(1.0, d1=Load(free_blocks=7, growth_blocks=3, waiting=2, running=3, heavy=1), d9=Load(free_blocks=1))
    assert world.columns() == {"d1": (7, 4, 1, 4), "d2": EMPTY}
    world.view(2.0, incarnation=2, d1=Load(free_blocks=1))
    assert world.columns()["d1"] == EMPTY


@pytest.mark.parametrize(
    "answered_at, age, counted",
    [(None, 0.0, True), (1.0, 0.0, False), (1.0, 1.5, True), (2.5, 0.0, True)],
    ids=["not answered", "before the report", "after an old report", "after the view"],
)
def test_an_own_offer_counts_until_a_report_was_made_after_its_answer(world, answered_at, age, counted):
    world.reserve(heavy=True)
    assert world.columns()["d1"] == (8, 7, 1, 0)
    if answered_at is not None:
        world.pool.answered(1, answered_at)
        world.pool.answered(1, 9.0)  # said again
    world.view(2.0, age=age, d1=Load(free_blocks=9))
    assert world.columns()["d1"] == ((7, 6, 1, 0) if counted else (9, 9, 0, 0))
    world.pool.answered(7, 1.0)  # of an offer that no longer counts


def test_what_is_kept_and_what_deferred_offers_wait_for_is_not_free(world):
    world.view(1.0, d1=Load(free_blocks=7, kept_blocks=2, deferred_blocks=4, growth_blocks=3))
    assert world.columns()["d1"] == (1, -2, 0, 0)
    world.home = Load(free_blocks=7, kept_blocks=2, deferred_blocks=9)
    assert world.columns()["p1"] == (-4, -4, 0, 0)


def test_who_deferred_has_nothing_free_until_a_report_was_made_after_that(world):
    """And then only what is left of it by all that is deferred there."""
    world.reserve(blocks=4, end_blocks=6)
    world.pool.deferred(1, 1.0)
    world.pool.deferred(7, 1.0)  # of an offer that no longer counts
    assert world.columns()["d1"] == (-1, -1, 0, 1) and world.choose() == "d2"
    world.view(0.9, d1=Load(free_blocks=10))
    assert world.columns()["d1"] == (6, 4, 0, 1)  # that report is older: the offer counts still
    world.view(1.1, d1=Load(free_blocks=6, deferred_blocks=4))
    assert world.columns()["d1"] == (2, 2, 0, 0)


def test_when_none_has_memory_the_one_that_lacks_least_is_asked_unless_it_has_refused(world):
    world.view(1.0, d1=Load(free_blocks=2, deferred_blocks=4), d2=Load(free_blocks=1, deferred_blocks=4))
    assert world.choose() is None and (world.later(), world.later("d1"), world.later("d1", "d2")) == ("d1", "d2", None)
    assert world.later(tokens=29, most=12) is None, "no instance is large enough"


def test_no_instance_is_asked_later_that_lacks_as_many_blocks_as_it_has(world):
    world.view(1.0, d1=Load(free_blocks=2, deferred_blocks=12), d2=Load(free_blocks=2, deferred_blocks=11))
    assert world.later() == "d2" and world.later("d2") is None


def test_who_refused_has_no_room_for_as_much_until_the_next_report(world):
    world.reserve(blocks=4, end_blocks=6)
    world.pool.refused(1)
    world.pool.refused(1)
    assert world.columns()["d1"] == (3, 3, 0, 0)
    assert (world.choose(blocks=4), world.choose(blocks=3)) == ("d2", "d1")
    world.view(1.0, d1=Load(free_blocks=8))
    assert world.choose(blocks=4) == "d1"


def test_a_monitor_that_is_silent_is_forgotten_with_what_no_view_can_contain_any_more(world):
    world.view(10.0, d1=Load(free_blocks=4))
    world.reserve(blocks=3)
    world.pool.answered(1, 10.1)
    world.peers.expire(12.0)
    assert world.columns()["d1"][0] == 1
    world.peers.expire(12.1)  # nothing since: the request may be long over, and no report will ever say so
    assert world.columns()["d1"][0] == 10
    world.reserve(2, blocks=3)
    assert world.columns()["d1"][0] == 10 - 3  # what is still on its way counts
    world.view(20.0, epoch=2, d1=Load(free_blocks=5))  # another monitor
    assert world.columns()["d1"][0] == 5 - 3


def test_who_refused_this_request_is_left_out_for_it_alone(world):
    assert world.choose() == "d1" and world.choose(refused=("d1", "gone")) == "d2"
    assert world.choose(refused=("d1", "d2")) is None and world.columns()["d1"] == EMPTY


def test_who_can_never_hold_a_request_is_left_out():
    small = instance("d1", "decode", capacity=capacity(blocks=4, context=30))
    world = World(small, BOTH[1])
    assert world.choose(most=12) == "d1" and world.choose(most=13) == "d2"  # 17 tokens take five blocks
    assert world.choose(tokens=29, most=1, blocks=8) == "d2"
    assert world.choose(most=40) is None
    assert not world.pool.fits(prefill_request(assign("a", 4, max_tokens=40)))


def test_the_last_choice_is_kept_for_round_robin_while_it_is_there():
    world = World(rules=Rules(decode_route="round_robin"))
    assert [world.choose() for _ in range(3)] == ["d1", "d2", "d1"]
    world.membership(instance("d0", "decode"), *BOTH)
    assert world.choose() == "d2"
    world.membership(instance("d0", "decode"), BOTH[0])
    assert world.choose() == "d0"


def test_home_is_a_column_while_it_decodes_and_never_stale(world):
    world.home = Load(free_blocks=6, growth_blocks=1, waiting=1)
    assert world.columns()["p1"] == (6, 5, 0, 1)
    world.reserve(iid="p1", heavy=True)
    assert world.pool.columns.free[-1] == 4  # until it says so itself, once that is granted
    assert world.columns()["p1"] == (6, 5, 0, 1)
    world.home = None
    assert list(world.columns()) == ["d1", "d2"]


@pytest.mark.parametrize(
    "free, chosen, later",
    [(6, "p1", "p1"), (0, "p1", "p1"), (-1, None, "p1")],
    ids=["much", "its own blocks", "less than nothing"],
)
def test_at_home_the_blocks_of_a_prompt_that_may_stay_count_as_free(free, chosen, later):
    """For it alone, and not once it is computed."""
    world = World(instance("p2", "prefill"))
    world.home = Load(free_blocks=free)
    before = world.columns()
    made = prefill_request(assign("a", 16))
    made.running = True
    need = Need(4, 4, False)
    assert world.pool.choose(made, need, (), Random(1)) == chosen
    assert world.pool.choose_later(made, (), Random(1)) == later and world.columns() == before
    made.choices[0].token = 7
    assert world.pool.choose(made, need, (), Random(1)) == ("p1" if free >= 4 else None)


def test_at_home_a_prompt_that_may_stay_must_fit_once():
    world = World(instance("p2", "prefill"), slots=3)
    world.home = Load(free_blocks=0)
    made = prefill_request(assign("a", 36, max_tokens=4))
    assert not world.pool.fits(made)
    world.columns()
    made.running = True
    assert world.pool.fits(made) and world.pool.choose(made, Need(9, 10, False), (), Random(1)) == "p1"


@pytest.mark.parametrize("slots, fits", [(8, False), (9, True)])  # three of them are the reserve
def test_at_home_a_prompt_must_fit_twice_or_wholly_into_the_open_slots(slots, fits):
    world = World(instance("p2", "prefill"), slots=slots)
    world.home = Load(free_blocks=CAPACITY.blocks)
    assert world.choose(tokens=20, blocks=5) == "p1"
    assert (world.choose(tokens=24, blocks=6) == "p1") == fits


# ---------------------------------------------------------------- instances that keep to prefill


@pytest.fixture
def adaptive(world):
    world.home = Load(free_blocks=9)
    return world


@pytest.mark.parametrize(
    "keeps, offered",
    [
        ((), ["d1", "d2", "p1"]),
        (("d1",), ["d2", "p1"]),
        (("p1",), ["d1", "d2"]),
        (("p1", "d1"), ["d2"]),
        (("p1", "d1", "d2"), ["d1", "d2", "p1"]),  # somebody must
        (("d1", "d2"), ["d1", "d2", "p1"]),  # without memory here, rather there than nowhere
    ],
)
def test_new_decodes_go_where_nobody_keeps_to_prefill(adaptive, keeps, offered):
    adaptive.view(1.0, keeps=keeps)
    assert [*adaptive.columns()] == offered


def test_who_keeps_to_prefill_decodes_when_nobody_else_can(adaptive):
    adaptive.view(1.0, keeps=("p1",))
    assert [*adaptive.columns()] == ["d1", "d2"]
    for gone in ("d1", "d2"):
        adaptive.peers.disconnected(gone)
    assert [*adaptive.columns()] == ["p1"] and adaptive.choose() == "p1"


def test_without_a_new_view_nobody_keeps_to_prefill(adaptive):
    adaptive.view(1.0, keeps=("d1",))
    assert [*adaptive.columns()] == ["d2", "p1"]
    adaptive.peers.expire(1.1 + adaptive.peers.own.view_s)
    assert [*adaptive.columns()] == ["d1", "d2", "p1"]
