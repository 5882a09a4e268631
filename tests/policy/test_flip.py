"""Which instance changes its role."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tetri.policy.flip import balance, below, idle, none, rescue
from tetri.policy.rules import FLIPS
from tetri.policy.views import FlipSettings, InstanceState, RoleChange

SETTINGS = FlipSettings(idle_s=60.0, low_s=30.0, floor=1, gain=2.0)


def state(iid, role, *, idle_s=0.0, low_s=0.0, work_s=0.0, **counts):
    return InstanceState(iid, role, idle_s, low_s, work_s, **{"queued": 0, "waiting": 0, **counts})


def resting(iid, role, seconds=90.0):
    return state(iid, role, idle_s=seconds, low_s=seconds)


def busy(iid, role):
    return state(iid, role, queued=int(role == "prefill"), waiting=int(role == "decode"), work_s=3.0)


def asked(policy, *states, settings=SETTINGS):
    change = policy(states, settings)
    return change and (change.iid, change.role)


@pytest.mark.parametrize("policy", [idle, below])
@pytest.mark.parametrize("role, other", [("prefill", "decode"), ("decode", "prefill")])
def test_who_rests_longest_goes_where_work_is(policy, role, other):
    assert asked(policy, resting("a", role), resting("b", role, 95.0), busy("c", other)) == ("b", other)
    assert asked(policy, resting("a", role), resting("b", role), busy("c", other)) == ("a", other)
    assert asked(none, resting("a", role), resting("b", role), busy("c", other)) is None


def test_idle_and_hardly_loaded_differ_and_name_their_seconds():
    states = [resting("a", "prefill"), resting("b", "prefill", 95.0), busy("c", "decode")]
    assert idle(states, SETTINGS) == RoleChange("b", "decode", "idle for 95 s")
    assert below(states, SETTINGS) == RoleChange("b", "decode", "hardly loaded for 95 s")
    others = [state("a", "prefill", work_s=0.1), busy("c", "decode")]
    assert asked(idle, *others, state("b", "prefill", idle_s=1.0, low_s=40.0)) is None
    assert asked(below, *others, state("b", "prefill", idle_s=1.0, low_s=40.0)) == ("b", "decode")
    assert asked(below, *others, state("b", "prefill", idle_s=1.0, low_s=29.0)) is None


@pytest.mark.parametrize("both", ["mixed", "auto"])
@pytest.mark.parametrize("policy", [idle, below])
def test_the_floor_stays_and_one_that_does_both_stays_and_counts_for_both(policy, both):
    assert asked(policy, resting("m", both), resting("n", both), busy("c", "decode")) is None
    assert asked(policy, resting("a", "prefill"), busy("c", "decode")) is None
    assert asked(policy, resting("a", "prefill"), busy("c", "decode"), busy("m", both)) == ("a", "decode")
    two = FlipSettings(idle_s=60.0, low_s=30.0, floor=2)
    states = [resting("a", "prefill"), resting("b", "prefill"), busy("c", "decode")]
    assert asked(policy, *states, settings=two) is None
    assert asked(policy, *states, resting("e", "prefill"), settings=two) == ("a", "decode")


@pytest.mark.parametrize("policy", [idle, below])
def test_nobody_flips_towards_a_pool_without_work(policy):
    states = [resting("a", "prefill"), resting("b", "prefill"), resting("c", "decode")]
    assert asked(policy, *states) is None
    assert asked(policy, *states[:2], state("c", "decode", running=3)) == ("a", "decode")  # all of it computes
    assert asked(policy, *states, state("d", "decode", running=3)) is None  # c has all the time in the world
    assert asked(policy, *states, busy("d", "decode")) == ("a", "decode")  # and yet somebody waits
    assert asked(policy, *states, state("d", "decode", queued=9)) is None  # left over from when it was a prefill one
    # While the only prompt is computed, its decode instance has it granted: that calls nobody.
    fetching = state("d", "decode", work_s=20.0, moving=1)
    computing = state("a", "prefill", work_s=0.3, queued=1)
    assert asked(policy, computing, states[1], fetching, resting("c", "decode", 9.0)) is None


def prefill(iid, work_s):
    return state(iid, "prefill", work_s=work_s, queued=int(work_s > 0))


def decode(iid, work_s, waiting=1, running=0):
    return state(iid, "decode", work_s=work_s, waiting=waiting, running=running)


def test_balance_moves_the_least_loaded_of_those_that_wait_less_and_held_up_prompts_wait_for_decode():
    states = [prefill("p0", 9.0), decode("d0", 1.0), decode("d1", 0.5), decode("d2", 2.0)]
    assert balance(states, SETTINGS) == RoleChange("d1", "prefill", "prefill waits 9.0 s, decode 1.2 s")
    assert asked(balance, decode("d0", 9.0), prefill("p0", 1.0), prefill("p1", 0.0)) == ("p1", "decode")
    held_up = [state(f"p{number}", "prefill", work_s=12.0, queued=20, stalled=True) for number in range(2)]
    full = [state(f"d{number}", "decode", work_s=30.0, running=9) for number in range(3)]
    assert balance([*held_up, *full], SETTINGS) == RoleChange("p0", "decode", "decode waits 8.0 s, prefill 0.0 s")
    assert balance([held_up[0], *full], SETTINGS) is None  # the floor
    held_up[1] = state("p1", "prefill", work_s=12.0, queued=20)  # nobody holds this one up
    assert balance([*held_up, *full], SETTINGS) is None


@pytest.mark.parametrize(
    "states",
    [
        [prefill("p0", 9.0), decode("d0", 0.0)],  # the floor
        [prefill("p0", 0.9), decode("d0", 0.0), decode("d1", 0.0)],  # not worth it
        [prefill("p0", 3.0), decode("d0", 2.0), decode("d1", 2.0)],  # not twice as long
        [prefill("p0", 4.0), decode("d0", 1.9), decode("d1", 1.9)],  # the others would wait longer then
        [prefill("p0", 9.0), state("m0", "mixed"), state("m1", "mixed")],  # nobody has a role to give up
        [decode("d0", 9.0), decode("d1", 0.0)],  # nobody there to compare with
        [],
        # A mixed one has 6 s of prefill and 1 s of decode.
        [state("m", "mixed", work_s=8.0, queued=6, waiting=1, running=1), prefill("p0", 5.0), prefill("p1", 5.0)],
    ],
)
def test_balance_leaves_alone(states):
    assert balance(states, SETTINGS) is None


def test_decodes_that_run_make_nobody_wait_and_those_on_their_way_do():
    many = [decode("d0", 90.0, waiting=0, running=9), decode("d1", 90.0, waiting=0, running=9)]
    assert asked(balance, prefill("p0", 3.0), *many) == ("d0", "prefill")
    mixed = state("m", "mixed", work_s=8.0, queued=6, waiting=1, running=1)
    assert asked(balance, mixed, decode("d0", 0.0, waiting=0)) == ("d0", "prefill")
    half = [decode("d0", 90.0, waiting=9, running=9), decode("d1", 90.0, waiting=9, running=9)]
    assert asked(balance, prefill("p0", 3.0), prefill("p1", 3.0), *half) == ("p0", "decode")
    crowded = state("d0", "decode", work_s=20.0, waiting=4, running=4, moving=12)
    states = [state("p0", "prefill", work_s=0.3, queued=1), resting("p1", "prefill"), crowded]
    assert balance(states, SETTINGS).why == "decode waits 16.0 s, prefill 0.1 s"


def test_rescue_makes_the_least_loaded_one_mixed():
    left = RoleChange("d1", "mixed", "no prefill instance is left")
    assert rescue([busy("d0", "decode"), resting("d1", "decode")]) == left
    assert rescue([busy("p0", "prefill")]) == RoleChange("p0", "mixed", "no decode instance is left")
    assert rescue([busy("p0", "prefill"), busy("m", "mixed")]) is None
    assert rescue([busy("w0", "auto"), busy("w1", "auto")]) is None
    assert rescue([]) is None


STATES = st.lists(
    st.builds(
        state,
        st.sampled_from("abcdefgh"),
        st.sampled_from(["prefill", "decode", "mixed", "auto"]),
        idle_s=st.sampled_from([0.0, 5.0, 80.0]),
        low_s=st.sampled_from([0.0, 5.0, 80.0]),
        work_s=st.sampled_from([0.0, 0.5, 2.0, 30.0]),
        queued=st.integers(0, 2),
        waiting=st.integers(0, 2),
        running=st.integers(0, 2),
    ),
    max_size=8,
    unique_by=lambda each: each.iid,
)


@settings(deadline=None, derandomize=True)
@given(STATES, st.integers(1, 3), st.sampled_from(sorted(FLIPS)))
def test_every_flip_leaves_the_floor_and_changes_a_role(states, floor, name):
    change = FLIPS[name](states, FlipSettings(floor=floor))
    if change is not None:
        (flipped,) = (each for each in states if each.iid == change.iid)
        assert {flipped.role, change.role} == {"prefill", "decode"}
        assert sum(each.role in (flipped.role, "mixed", "auto") for each in states) > floor
