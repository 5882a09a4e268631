"""The other instances as a worker knows them: how their KV comes, whom it never asks, and how old its news are."""

import pytest

from tests.core.build import fingerprint, identity, instance, membership, reach, view
from tetri.core.actions import Connect, Disconnect
from tetri.core.instance.peers import Peers


def peers(*instances, mine=("shm",)):
    made = Peers(identity("p1", "prefill", reach=reach("p1", paths=list(mine))))
    made.update(membership(1, instance("p1", "prefill"), *instances))
    for each in instances:
        made.connected(each.iid)
    return made


@pytest.mark.parametrize(
    "changes, able",
    [
        ({}, True),
        ({"role": "mixed"}, True),
        ({"role": "prefill"}, False),
        ({"fingerprint": fingerprint(model="other")}, False),
        ({"reach": reach("d1", host="elsewhere")}, False),
        ({"reach": reach("d1", paths=["stream"])}, False),
    ],
)
def test_only_those_are_asked_to_which_kv_can_move(changes, able):
    other = instance(**{"iid": "d1", "role": "decode", **changes})
    assert [each.iid for each in peers(other).decoders()] == ["d1"] * able


def test_the_way_of_kv_is_known_of_this_very_start_only():
    known = peers(instance("d1", "decode", 7, reach=reach("d1", paths=["stream", "shm"], segment="slab-7")))
    assert known.way("d1", 7) == ("shm", "slab-7")
    assert known.way("d1", 6) is None and known.way("d2", 7) is None
    assert known.way("p1", 1) == ("local", "s-p1")  # to itself, whichever start is named: no message crosses a start


def test_a_restarted_instance_is_read_anew():
    made = peers(instance("d1", "decode"))
    again = instance("d1", "decode", 2, reach=reach("d1", segment="new"))
    actions, gone = made.update(membership(2, again))
    assert actions == [Disconnect("d1"), Connect("d1", "at-d1", again.reach)] and gone == ["d1"]
    assert made.way("d1", 2) == ("shm", "new") and made.decoders() == []


def test_a_change_is_applied_to_the_membership_that_it_is_a_change_of():
    """Whatever arrives twice or late, each instance is as the newest number says."""
    made = peers(instance("d1", "decode"), instance("d2", "decode"))
    change = membership(2, instance("d1", "mixed"), instance("d3", "decode"), since=1, gone=["d2"])
    old = membership(1, since=0, gone=["d1"])
    assert not any(made.update(old)) and not made.behind
    actions, gone = made.update(change)
    assert gone == ["d2"] and [action.peer for action in actions] == ["d2", "d3"]
    assert not any(made.update(change)) and not any(made.update(old)) and not made.behind
    assert {iid: each.role for iid, each in made.instances.items()} == {"d1": "mixed", "d3": "decode"}
    assert not any(made.update(membership(4, since=3, gone=["d1"]))) and made.behind


def test_prompts_go_elsewhere_only_where_they_fit():
    """Ten blocks of four tokens, and a context of 40."""
    there = peers(instance("p2", "prefill"))
    assert there.prefills(39) and not there.prefills(40) and not peers(instance("d2", "decode")).prefills(8)


def test_only_a_newer_view_is_news():
    known = peers(instance("d1", "decode"))
    assert known.see(view(5, d1=3), 1.0) and not known.see(view(4, d1=9), 2.0) and not known.see(view(5, d1=9), 2.0)
    assert [each.load.free_blocks for each in known.loads().values()] == [3]
    assert known.see(view(1, epoch=2, d1=8), 2.0)  # of another monitor
    assert [each.load.free_blocks for each in known.loads().values()] == [8]


def test_loads_are_known_as_long_as_views_come():
    known = peers(instance("d1", "decode"))
    for number in range(1, 30):
        known.see(view(number, d1=4), number * 1.0)
        known.expire(number + 2.0)
        assert known.loads()
    known.expire(31.1)
    assert not known.loads()
