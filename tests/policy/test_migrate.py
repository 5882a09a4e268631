"""Which running decodes go on elsewhere, and where."""

import pytest

from tetri.policy.migrate import AT_ONCE, LEAST_LEFT, auto, everywhere, gives_up, none
from tetri.policy.views import DecodeInstance, RunningDecode


def instance(iid, free=50, running=2, role="auto", places=8, **changes):
    return DecodeInstance(iid, role, free, running, places, **changes)


def decodes(*blocks, left=100, more=1):
    return [RunningDecode(f"r{number}", size, size + more, left) for number, size in enumerate(blocks)]


LEFT = instance("a", role="prefill", running=3)
SHORT = instance("a", free=1, running=3)


@pytest.mark.parametrize(
    ("made", "gives"),
    [
        (LEFT, True),
        (instance("a", role="prefill", running=0), False),
        (SHORT, True),
        (instance("a", free=3, running=3), False),
        (instance("a", free=-4, running=3), True),
        (instance("a", free=0, running=0), False),
    ],
)
def test_who_takes_none_any_more_or_lacks_a_block_for_each_gives_some_up(made, gives):
    assert gives_up(made.role, made.running, made.free_blocks) == gives


def test_all_leave_an_instance_that_takes_none_any_more_to_where_most_memory_is():
    moves = auto([LEFT, instance("b", free=40), instance("c", free=38)], {"a": decodes(9, 5, 7)})
    assert moves == [("r0", "b"), ("r2", "c"), ("r1", "b")], "the longest first; each leaves less there"


def test_of_one_that_is_short_no_more_leave_than_it_must():
    assert auto([SHORT, instance("b")], {"a": decodes(1, 9, 5)}) == [("r1", "b")]
    on_their_way = instance("a", free=1, running=3, outgoing=1, outgoing_blocks=9)
    assert auto([on_their_way, instance("b")], {"a": decodes(1, 5)}) == []


@pytest.mark.parametrize(
    "target",
    [
        instance("b", free=11),
        instance("b", places=0),
        instance("b", role="prefill"),
        instance("b", free=1, running=2),
    ],
    ids=["no memory beside its own", "no place", "takes none", "short itself"],
)
def test_nobody_takes_what_it_cannot_hold(target):
    assert everywhere([SHORT, target], {"a": decodes(9)}) == []


def test_a_batch_is_not_filled_beyond_its_places_nor_an_instance_left_by_all_at_once():
    assert len(auto([LEFT, instance("b", places=2)], {"a": decodes(3, 3, 3)})) == 2
    many = {"a": decodes(*[1] * 9)}
    assert len(auto([LEFT, instance("b", places=20)], many)) == AT_ONCE
    outgoing = instance("a", role="prefill", outgoing=AT_ONCE - 1)
    assert len(auto([outgoing, instance("b", places=20)], many)) == 1


def test_a_decode_that_hardly_goes_on_ends_where_it_is():
    assert auto([LEFT, instance("b")], {"a": decodes(3, left=LEAST_LEFT - 1)}) == []


def test_the_setting_says_which_instances_take_some():
    both, given = [SHORT, instance("b", role="decode")], {"a": decodes(9)}
    assert none(both, given) == [] and auto(both, given) == [] and everywhere(both, given) == [("r0", "b")]
    assert auto([SHORT, instance("b")], given) == [("r0", "b")]
