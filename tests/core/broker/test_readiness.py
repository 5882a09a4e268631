"""Readiness: which pairs of instances have lately carried KV, and the canaries that try the others."""

import pytest

from tests.core.broker.serving import RID, replies, serving, submit
from tests.core.broker.work import opcodes
from tests.core.build import close, failed, fingerprint, heartbeat, ready, staged, tokens
from tests.core.reading import sent
from tetri.core.actions import Broken, FromClient, Send
from tetri.core.broker.readiness import EVERY_S, LATE_S, MOST_LISTED, NO_PAIR, PER_PAIR_S
from tetri.request import Stage
from tetri.wire.clients import CheckReadiness
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.load import Load
from tetri.wire.messages import Assign, Close, FromWorker, Hold

READY_S = 30.0
ASK = FromClient(b"probe", CheckReadiness())
WORKS = Load(free_blocks=5, busy=0.9, queued=3, running=2)
FULL = Load(free_blocks=1, kept_blocks=1, busy=0.9, running=2)


def canary(number=1):
    return f"canary-2a-{number}"  # of epoch 42


def ask(told):
    """The answer, and the actions."""
    actions = told.tell(ASK)
    (answer,) = replies(actions, b"probe")
    return answer, actions


def states(told):
    return {(each.prefill, each.decode): each.state for each in ask(told)[0].pairs}


def tried(actions):
    """The pairs whose canaries start."""
    found = [each for each in actions if isinstance(each, Send) and isinstance(each.message, Assign)]
    return [(each.peer, each.message.pinned) for each in found if each.message.pinned]


def land(told, prefill="p1", decode="d1", number=1):
    """A canary arrives and gets its second token."""
    rid = canary(number)
    told.tell(staged(prefill, rid, Stage.PREFILL), tokens(prefill, rid, 0, 1), staged(decode, rid, Stage.WAITING))
    return told.tell(tokens(decode, rid, 1, 2, reason="length"))


def keep_asking(told, seconds, alive=()):
    """Somebody asks every second; these workers stay alive."""
    actions = []
    for _ in range(int(seconds)):
        actions += told.later(1.0)
        actions += told.tell(*(heartbeat(iid, role="any") for iid in alive), ASK)
    return actions


@pytest.fixture
def told():
    return serving("p1", "d1", limits={"ready_s": READY_S, "dead_s": 1e4})


# ---------------------------------------------------------------- one pair


def test_a_pair_is_ready_once_a_canary_has_landed(told):
    answer, actions = ask(told)
    assert not answer.ready and answer.why == "p1 to d1 is unknown: no KV has moved yet"
    assert (answer.in_service, answer.within_s, answer.pairs[0].age_s) == (1, READY_S, None)
    (assign,) = sent(actions, "p1", Assign)
    assert (assign.rid, assign.attempt, assign.pinned) == (canary(), 1, "d1")
    assert assign.sampling.max_tokens == 2 and assign.sampling.ignore_eos and len(assign.prompt) == 1
    told.later(0.5)
    closed = land(told)
    assert sent(closed) == [close(canary(), reason="cancelled")] * 2 and [each.peer for each in closed] == ["p1", "d1"]
    told.later(0.25)
    answer, actions = ask(told)
    (pair,) = answer.pairs
    assert answer.ready and (answer.why, pair.state, pair.age_s, pair.why) == ("", "carried", 0.25, "")
    assert not sent(actions)


def test_traffic_makes_a_pair_ready_without_a_canary(told):
    told.tell(submit(), staged("p1", RID, Stage.PREFILL), tokens("p1", RID, 0, 7), staged("d1", RID, Stage.WAITING))
    answer, actions = ask(told)
    assert answer.ready and not sent(actions)


def test_nobody_sees_a_canary_but_the_workers(told):
    before = told.status()
    ask(told)
    told.tell(heartbeat("p1", Hold(canary(), 1, Stage.QUEUED, 0), role="prefill", read=9))
    assert told.status().requests == {} and told.status().counters == before.counters
    land(told)
    assert told.status().requests == {} and told.status().counters == before.counters
    assert not told.core.table.choices and not told.core.table.work_ns


def test_a_heartbeat_shows_what_lost_messages_would_have(told):
    ask(told)
    assert not sent(told.tell(heartbeat("d1", Hold(canary(), 1, Stage.MOVING, 0), role="decode")), kind=Close)
    assert states(told) == {("p1", "d1"): "unknown"}
    told.tell(heartbeat("d1", Hold(canary(), 1, Stage.DONE, 2), role="decode"))
    assert states(told) == {("p1", "d1"): "carried"}
    assert sent(told.later(LATE_S), kind=Close) == [close(canary(), reason="cancelled")] * 2
    assert states(told) == {("p1", "d1"): "carried"}


def test_the_second_token_shows_that_the_kv_has_landed(told):
    ask(told)
    told.tell(tokens("p1", canary(), 0, 1))
    assert states(told) == {("p1", "d1"): "unknown"}
    told.tell(tokens("d1", canary(), 1, 2))
    assert states(told) == {("p1", "d1"): "carried"}


def test_a_canary_that_has_ended_is_closed_again_where_it_is_listed(told):
    ask(told)
    land(told)
    told.later(10.0)  # Memberships are sent meanwhile
    listed = heartbeat("d1", Hold(canary(), 1, Stage.DECODE, 2), role="decode", read=told.core.members.serial)
    assert sent(told.tell(listed), "d1", Close) == [close(canary())]


def test_while_somebody_asks_a_canary_comes_before_the_last_hand_over_is_too_old(told):
    ask(told)
    land(told)
    found = keep_asking(told, READY_S / 2 - 1)
    assert not tried(found)
    assert tried(keep_asking(told, 1)) == [("p1", "d1")] and ask(told)[0].ready


def test_an_old_hand_over_does_not_count(told):
    ask(told)
    land(told)
    told.later(2 * READY_S + 1)
    answer, actions = ask(told)
    assert not answer.ready and answer.why == "p1 to d1 is unknown: no KV has moved for 61 s"
    assert tried(actions) == [("p1", "d1")]


def test_canaries_stop_when_nobody_asks(told):
    actions = ask(told)[1]
    for number in range(1, 200):
        rids = [each.rid for each in sent(actions, "p1", Assign)]
        actions = [action for rid in rids for action in land(told, number=int(rid.split("-")[-1]))]
        actions = told.later(1.0)
        if number > 2 * READY_S:
            assert not tried(actions) and told.core.pair_checks.deadline() is None


# ---------------------------------------------------------------- broken, busy


def test_a_pair_is_broken_when_its_kv_cannot_be_read_and_well_again_with_the_next_hand_over(told):
    ask(told)
    assert sent(told.tell(failed("p1", canary(), retry=True, avoid=["d1", "p1"])), kind=Close)
    answer, _ = ask(told)
    assert not answer.ready and answer.why == "p1 to d1 is broken: oh no"
    assert tried(told.later(EVERY_S)) == [("p1", "d1")]
    land(told, number=2)
    assert ask(told)[0].ready


def test_a_pair_is_broken_while_a_heartbeat_says_so(told):
    """Traffic alone shows it, and a hand-over that landed before does not hide it."""
    ask(told)
    land(told)
    told.tell(heartbeat("p1", role="prefill", unread_by={"d1": "no such segment"}))
    answer, _ = ask(told)
    assert answer.why == "p1 to d1 is broken: no such segment"
    assert tried(told.later(EVERY_S)) == [("p1", "d1")]
    land(told, number=2)
    assert not ask(told)[0].ready  # until the worker says otherwise
    told.tell(heartbeat("p1", role="prefill"))
    assert ask(told)[0].ready


def test_an_error_of_the_engine_is_a_broken_pair(told):
    ask(told)
    end = tokens("p1", canary(), 0, reason="error")
    (item,) = end.items
    told.tell(end.changed(items=[type(item)(item.rid, 1, 0, [], item.end.changed(error="NaN"))]))
    assert ask(told)[0].why == "p1 to d1 is broken: NaN"


def test_a_canary_that_is_given_up_otherwise_shows_nothing(told):
    ask(told)
    told.tell(failed("p1", canary(), retry=True))
    assert ask(told)[0].why == "p1 to d1 is unknown: oh no"


@pytest.mark.parametrize(
    ("reports", "why"),
    [
        ([], "p1 did not prefill a canary within 10 s"),
        ([staged("p1", canary(), Stage.PREFILL)], "p1 did not prefill a canary within 10 s"),
        ([staged("p1", canary(), Stage.MOVING)], "KV of p1 did not reach d1 within 10 s"),
        ([staged("d1", canary(), Stage.WAITING)], "d1 did not decode a canary within 10 s"),
        (
            [
                staged("d1", canary(), Stage.WAITING),
                staged("p1", canary(), Stage.MOVING),
            ],  # they came in the other order
            "d1 did not decode a canary within 10 s",
        ),
    ],
)
def test_a_late_canary_on_idle_instances_shows_a_broken_pair(told, reports, why):
    ask(told)
    told.tell(*reports)
    told.later(LATE_S - 0.5)
    assert ask(told)[0].pairs[0].state in ("unknown", "carried")
    assert sent(told.later(1.0), "d1", Close) == [close(canary(), reason="cancelled")]
    answer, _ = ask(told)
    assert not answer.ready and answer.why == f"p1 to d1 is broken: {why}"


@pytest.mark.parametrize(
    ("iid", "load", "stage", "why"),
    [
        ("p1", WORKS, Stage.QUEUED, "p1 has 2 prompts to prefill first"),
        ("d1", FULL, Stage.MOVING, "d1 has no free KV memory"),
        ("d1", FULL, Stage.QUEUED, "d1 has no free KV memory"),
        ("d1", WORKS, Stage.DECODE, "d1 has 2 requests to decode"),
    ],
)
def test_busy_is_not_broken(told, iid, load, stage, why):
    ask(told)
    told.tell(heartbeat(iid, Hold(canary(), 1, stage, 0), role="any", load=load))
    told.later(LATE_S)
    told.later(READY_S + 1)
    if stage is not Stage.DECODE:  # otherwise its KV had landed, and is the last that did
        told.tell(heartbeat(iid, role="any", load=load))
        answer, _ = ask(told)
        assert answer.ready and answer.pairs[0].state == "busy"
    else:
        assert ask(told)[0].why == f"p1 to d1 is unknown: {why}"


@pytest.mark.parametrize("load", [WORKS, FULL])
def test_what_is_queued_at_an_instance_that_does_not_compute_is_stuck_and_not_busy(told, load):
    idle = load.changed(busy=0.0)
    ask(told)
    told.tell(heartbeat("p1", role="any", load=idle), heartbeat("d1", role="any", load=idle))
    told.later(LATE_S)
    assert ask(told)[0].pairs[0].state == "broken"


def test_other_kv_in_the_slab_is_work_too(told):
    told.tell(heartbeat("p1", role="prefill", load=WORKS.changed(queued=0), slots_used=4))
    assert ask(told)[0].pairs[0].why == "p1 has other KV to send first"


def test_a_pair_that_is_broken_stays_so_while_it_is_busy(told):
    ask(told)
    told.tell(failed("p1", canary(), retry=True, avoid=["d1"]), heartbeat("p1", role="prefill", load=WORKS))
    told.later(EVERY_S)
    told.later(LATE_S)
    assert ask(told)[0].pairs[0].state == "broken"


# ---------------------------------------------------------------- many pairs, and who is in service


def test_traffic_of_other_pairs_hides_nothing():
    told = serving("p1", "p2", "d1", "d2", limits={"dead_s": 1e4})
    for prefill, decode in (("p1", "d1"), ("p1", "d2"), ("p2", "d1")):
        told.core.pair_checks.carried(prefill, decode, told.now)
    assert tried(ask(told)[1]) == [("p2", "d2")]
    told.tell(failed("p2", canary(), retry=True, avoid=["d2"]))
    answer, _ = ask(told)
    assert answer.why == "p2 to d2 is broken: oh no" and answer.in_service == 4
    assert [(each.prefill, each.decode) for each in answer.pairs if each.state != "carried"] == [("p2", "d2")]


def test_at_most_one_canary_starts_each_second_and_each_pair_has_its_turn():
    told = serving("p1", "p2", "d1", "d2", limits={"dead_s": 1e4})
    found = tried(ask(told)[1])
    for _ in range(int(LATE_S / EVERY_S) + 2):
        assert not tried([*told.tell(ASK), *told.later(EVERY_S / 2), *told.tell(ASK)])
        found += tried(told.later(EVERY_S / 2))
    assert sorted(found[:4]) == [("p1", "d1"), ("p1", "d2"), ("p2", "d1"), ("p2", "d2")]
    assert found[4:] == found[:3]  # none while all are on their way, for LATE_S


def test_a_broken_pair_does_not_keep_the_others_from_their_turn():
    """Each second a canary fails; the other pair has one in time all the same."""
    told = serving("p1", "d1", "d2", limits={"dead_s": 1e4, "ready_s": 10.0})
    actions, number = ask(told)[1], 0
    for _ in range(60):
        for peer, decode in tried(actions):
            number += 1
            if decode == "d1":
                told.tell(failed(peer, canary(number), retry=True, avoid=["d1"]))
            else:
                land(told, peer, decode, number)
        actions = [*told.later(EVERY_S), *told.tell(ASK)]
        if told.now > 3:
            assert states(told) == {("p1", "d1"): "broken", ("p1", "d2"): "carried"}


def test_with_many_pairs_a_hand_over_counts_for_longer():
    told = serving(*(f"p{n}" for n in range(4)), *(f"d{n}" for n in range(4)), limits={"ready_s": READY_S})
    assert ask(told)[0].within_s == 16 * PER_PAIR_S > READY_S


def test_a_mixed_instance_is_a_pair_with_itself():
    told = serving("m1", limits={"dead_s": 1e4})
    assert tried(ask(told)[1]) == [("m1", "m1")]
    assert len(land(told, "m1", "m1")) == 1 and ask(told)[0].ready  # one Close


@pytest.mark.parametrize("workers", [[], ["p1"], ["d1"], ["p1", ("d1", {"fingerprint": fingerprint(dtype="f32")})]])
def test_without_a_pair_nothing_is_ready(workers):
    answer, actions = ask(serving(*workers))
    assert not answer.ready and answer.why == NO_PAIR and not sent(actions)


def test_a_lost_instance_is_out_of_service_and_new_when_it_is_back(told):
    told.tell(ready("d2", "decode"), PeerUp("d2"))
    told.core.pair_checks.carried("p1", "d1", 0.0)
    told.core.pair_checks.carried("p1", "d2", 0.0)
    assert states(told) == {("p1", "d1"): "carried", ("p1", "d2"): "carried"}
    told.tell(PeerDown("d2"))
    assert states(told) == {("p1", "d1"): "carried"} and ask(told)[0].ready
    told.tell(PeerUp("d2"), FromWorker(iid="d2", incarnation=1))
    assert states(told) == {("p1", "d1"): "carried", ("p1", "d2"): "unknown"}
    told.tell(ready("p1", "prefill", incarnation=2))
    assert states(told) == {("p1", "d1"): "unknown", ("p1", "d2"): "unknown"}


def test_a_canary_ends_with_its_worker(told):
    ask(told)
    assert sent(told.tell(PeerDown("d1")), "p1", Close) == [close(canary(), reason="cancelled")]
    assert not told.tell(staged("p1", canary(), Stage.MOVING), tokens("p1", canary(), 0, 1))


def test_kv_that_lands_at_an_instance_of_another_role_by_now_counts_for_no_pair(told):
    ask(told)
    land(told)
    told.core.pair_checks.carried("d1", "p1", told.now)
    told.later(READY_S / 2)
    assert states(told) == {("p1", "d1"): "carried"}


def test_of_many_pairs_only_some_are_listed_those_that_are_not_ready_first():
    told = serving(*(f"p{n}" for n in range(9)), *(f"d{n}" for n in range(9)), limits={"dead_s": 1e4})
    ask(told)
    for prefill, decode in told.core.members.pairs()[1:]:
        told.core.pair_checks.carried(prefill, decode, told.now)
    answer, _ = ask(told)
    assert (answer.in_service, len(answer.pairs), answer.pairs[0].state) == (81, MOST_LISTED, "unknown")
    assert answer.why == "p0 to d0 is unknown: no KV has moved yet"
    told.core.pair_checks.carried("p0", "d0", told.now)
    assert ask(told)[0].ready


def test_pairs_that_have_carried_lately_are_listed_after_the_others(told):
    told.tell(ready("d2", "decode"), PeerUp("d2"))
    checks = told.core.pair_checks
    checks.carried("p1", "d2", 0.0)
    checks.carried("p1", "d1", 20.0)
    checks.unread("p1", {"d1": "it is to be tried again"})
    told.now = READY_S + 1
    assert [(each.decode, each.state) for each in ask(told)[0].pairs] == [("d2", "unknown"), ("d1", "carried")]


def test_the_work_of_a_hand_over_does_not_grow_with_the_pairs():
    counts = []
    for size in (2, 20):
        told = serving(*(f"p{n}" for n in range(size)), *(f"d{n}" for n in range(size)))
        ask(told)
        checks = told.core.pair_checks
        checks.carried("p1", "d1", 0.0)
        counts.append(opcodes(lambda checks=checks: checks.carried("p1", "d1", 1.0)))
    assert counts[0] == counts[1] < 60


def test_a_pair_in_two_places_is_noticed(told):
    ask(told)
    checks = told.core.pair_checks
    checks._carried.update(checks._open)
    with pytest.raises(Broken, match="p1"):
        checks.check()


def test_a_client_cannot_ask_for_a_route(told):
    (found,) = sent(told.tell(submit()), "p1", Assign)
    assert found.pinned == ""
