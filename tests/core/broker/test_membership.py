"""Who is there, since when silent, and which instances may prefill what."""

from random import Random

import pytest

from tests.core.broker.serving import RID, assigned, serving, submit
from tests.core.broker.work import opcodes
from tests.core.build import PHASES, capacity, failed, fingerprint, heartbeat, identity, ready, staged, tokens
from tests.core.reading import only, sent
from tetri.core.actions import Broken, Disconnect, Send
from tetri.core.broker.broker import OLD_S
from tetri.core.broker.membership import FORGET_S, LEAST_SHARE, Members
from tetri.core.instance.peers import Peers
from tetri.request import Slo, Stage, StepRatio
from tetri.wire.codec import encode
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.load import Load
from tetri.wire.messages import Assign, ClusterView, FromWorker, InstanceLoad, Membership
from tetri.wire.observation import Activity

OTHER = fingerprint(dtype="f32")


def members(*workers):
    """Of (iid, role, changes of the Ready), all connected."""
    made = Members(1)
    for iid, role, *changes in workers:
        made.ready(ready(iid, role, **(changes[0] if changes else {})), 0.0)
        made.connected(iid)
    return made


class Work:
    """What is assigned: nanoseconds of prefill by instance, and open requests."""

    def __init__(self, work_ns=None, **requests):
        self.work_ns, self.requests = work_ns or {}, requests

    def held_by(self, iid):
        return range(self.requests.get(iid, 0))


def pool(made, tokens=1):
    return made.pool(tokens, Work()).iids


def test_a_prompt_goes_only_where_it_fits():
    """By memory, and by the context that the engine knows."""
    made = members(
        ("small", "prefill", {"capacity": capacity(blocks=2)}),
        ("large", "prefill", {"capacity": capacity(blocks=9)}),
        ("short", "prefill", {"capacity": capacity(context=12)}),
    )
    assert pool(made, 8) == ["small", "large", "short"]
    assert pool(made, 9) == pool(made, 11) == ["large", "short"]
    assert pool(made, 12) == pool(made, 36) == ["large"]
    assert pool(made, 37) == []


def test_what_only_its_own_prefill_instance_can_decode_must_fit_there_twice():
    made = members(("m0", "mixed"), ("p0", "prefill"))
    assert pool(made, 20) == ["m0", "p0"] and pool(made, 21) == ["p0"]
    made.turn(made.by_iid["p0"], "mixed")
    assert pool(made, 21) == ["m0", "p0"]
    assert pool(members(("m0", "mixed")), 21) == ["m0"]  # its KV store may be large enough


def test_only_those_whose_kv_somebody_takes():
    made = members(("p0", "prefill"), ("p1", "prefill", {"fingerprint": OTHER}))
    assert pool(made) == ["p0", "p1"]  # whoever comes may take it
    made.ready(ready("d0", "decode"), 0.0)  # not connected yet, and there all the same
    assert pool(made) == ["p0"]
    made.ready(ready("m0", "mixed", fingerprint=OTHER), 0.0)
    made.connected("m0")
    assert pool(made) == ["p0", "p1", "m0"]


def test_work_is_told_in_seconds_and_the_last_choice_is_remembered():
    made = members(("p0", "prefill"), ("p1", "prefill"))
    first = made.pool(1, Work({"p1": 2_500_000_000}))
    assert first.queued_s == [0.0, 2.5]
    first.last = 1
    for iid in ("p0", "p1"):
        made.recount(iid)
    assert made.pool(1, Work({"p0": 10**9})) is first and (first.queued_s, first.last) == ([1.0, 0.0], 1)


def test_work_is_counted_where_it_has_changed_in_every_pool():
    made = members(("small", "prefill", {"capacity": capacity(blocks=2)}), ("large", "prefill"))
    work = Work({"small": 10**9, "large": 2 * 10**9})
    assert [made.pool(tokens, work).queued_s for tokens in (8, 9)] == [[1.0, 2.0], [2.0]]
    work.work_ns["large"] = 3 * 10**9
    with pytest.raises(Broken, match=r"large: \(2.0, 0\) listed, \(3.0, 0\) counted"):
        made.check(work)
    made.recount("large")
    made.check(work)
    assert [made.pool(tokens, work).queued_s for tokens in (8, 9)] == [[1.0, 3.0], [3.0]]
    made.by_iid["small"].slowness = 2.0
    made.recount("small")
    made.recount("gone")
    assert made.pool(1, work).queued_s == [2.0, 3.0]
    made.check(work)


def test_the_account_of_work_follows_every_request(served):
    """`check` compares it after every event."""
    served.tell(ready("p2", "prefill"), PeerUp("p2"))
    placed = [assigned(served.tell(submit(key, (1,) * 6)))[0][0] for key in ("a", "b", "c")]
    assert sorted({*placed}) == ["p1", "p2"]
    served.tell(heartbeat("p1", step_ratio=StepRatio(prefill=2.0)), tokens(placed[0], RID, 0, 7))
    served.tell(PeerDown(placed[1]))
    served.later(0.3)


def test_a_choice_costs_no_more_the_more_instances_there_are():
    """Counted, not timed. The rest is the route's."""

    def work(instances):
        made = members(*[(f"a{number}", "auto") for number in range(instances)])
        made.viewed(autos(1, **{iid: busy() for iid in made.by_iid}))
        made.pool(1, Work())
        made.recount("a1")
        return opcodes(lambda: made.pool(1, Work({"a1": 10**9}, a1=3)))

    assert work(40) == work(4)


def autos(number, **loads):
    """A view of adaptive instances, and of those in fixed roles: named by their first letters."""
    entries = [InstanceLoad(iid, 1, "auto" if iid[0] == "a" else "mixed", 0.0, load) for iid, load in loads.items()]
    return ClusterView(epoch=1, number=number, loads=entries)


def busy(share=1.0):
    return Load(free_blocks=5, share=share)


def test_a_view_tells_how_much_time_the_decodes_of_adaptive_instances_leave():
    made = members(("a0", "auto"), ("a1", "auto"), ("a2", "auto"), ("m0", "mixed"))
    before = made.pool(1, Work())
    assert before.share == [1.0] * 4
    made.viewed(autos(1, a0=busy(share=0.5), a1=busy(share=0.0), a2=busy(), m0=busy(share=0.1)))
    assert made.pool(1, Work()) is before and before.share == [0.5, LEAST_SHARE, 1.0, 1.0]
    made.viewed(autos(2, a1=busy(share=0.7)))  # one that reports no more is taken to decode nothing
    assert before.share == [1.0, 0.7, 1.0, 1.0]


def test_adaptive_instances_count_their_open_requests():
    made = members(("a0", "auto"), ("a1", "auto"), ("a2", "auto"), ("m0", "mixed"))
    work = Work(a0=3, a1=3, a2=1, m0=9)
    pool = made.pool(1, work)
    assert pool.requests == [4, 4, 2, 0]
    work.requests["a1"] = 1
    with pytest.raises(Broken, match=r"a1: \(0.0, 4\) listed, \(0.0, 2\) counted"):
        made.check(work)
    made.recount("a1")
    assert made.pool(1, work) is pool and pool.requests == [4, 2, 2, 0]
    made.viewed(autos(1, a0=busy(), a1=busy(), a2=busy()).changed(keeps={"a0": "prefill"}))
    made.check(work)
    made.pool(1, work)  # what it decodes yet does not count
    assert pool.requests == [0, 2, 2, 0]
    made.viewed(autos(2, a0=busy(), a1=busy(), a2=busy()))
    assert made.pool(1, work).requests == [4, 2, 2, 0]
    made.check(work)


def test_who_joins_between_two_views_is_counted_and_fixed_roles_count_no_requests():
    made = members(("a0", "auto"))
    made.viewed(autos(1, a0=busy(share=0.5)))
    made.ready(ready("a1", "auto"), 0.0)
    made.connected("a1")
    pool = made.pool(1, Work(a0=2))
    assert (pool.iids, pool.share, pool.requests) == (["a0", "a1"], [0.5, 1.0], [3, 1])
    made = members(("m0", "mixed"), ("m1", "mixed"))
    made.viewed(autos(1, m0=busy(share=0.5)))
    assert (made.pool(1, Work(m0=2)).share, made.pool(1, Work(m0=2)).requests) == ([1.0, 1.0], [0, 0])


def test_a_worker_that_harms_its_kv_on_purpose_is_named():
    made = members(("p0", "prefill"), ("d0", "decode"))
    made.by_iid["d0"].counters = {"injected_drop": 0}
    made.by_iid["p0"].counters = {"duplicate": 3}
    note = "a rehearsal: faults are injected here (transfer.faults, transfer.cuts)"
    assert [status.note for status in made.status()] == [note, ""]


def test_a_worker_whose_segment_others_removed_is_named():
    made = members(("p0", "prefill"), ("d0", "decode"))
    made.by_iid["p0"].counters = {"duplicate": 3, "segment_unlinked": 1}
    note = "its segment was removed from /dev/shm: see tetri-cli doctor"
    assert {status.iid: status.note for status in made.status()} == {"d0": "", "p0": note}


def test_a_membership_is_made_when_there_is_a_change_or_silence():
    made = members(("p0", "prefill"))
    assert len(made.publish_due(1.0)) == 1 and made.publish_due(1.1) == made.refresh(1.1) == []
    made.turn(made.by_iid["p0"], "mixed")
    (send,) = made.publish_due(1.2)
    assert [entry.role for entry in send.message.instances] == ["mixed"] and made.refresh(1.9) == []
    (kept_alive,) = made.refresh(2.0)
    assert (kept_alive.message.since, kept_alive.message.number) == (2, 2) and not kept_alive.message.instances


def test_a_whole_membership_goes_to_whom_a_change_would_not_be_enough():
    made = members(("p0", "prefill"), ("d0", "decode"))
    made.publish(1.0)
    made.ready(ready("p1", "prefill"), 1.1)
    made.ready(ready("d0", "decode"), 1.1)  # again: it lacks something
    made.lose(made.by_iid["p0"], "silent")
    to_p0, to_d0 = (send.message for send in made.publish_due(1.1))
    assert (to_p0.since, to_p0.number, [each.iid for each in to_p0.instances], to_p0.gone) == (1, 2, ["p1"], ["p0"])
    assert (to_d0.since, to_d0.number, [each.iid for each in to_d0.instances]) == (None, 2, ["d0", "p1"])


def test_who_registers_again_alone_is_answered_alone():
    made = members(("p0", "prefill"), ("d0", "decode"))
    made.publish(1.0)
    made.ready(ready("d0", "decode"), 2.0)
    assert [(send.peer, send.message.number, send.message.since) for send in made.publish_due(2.0)] == [
        ("p0", 1, 1),
        ("d0", 1, None),
    ]


def test_changes_that_come_together_leave_together(served):
    """The start of many workers at once: each learns of all, by one whole Membership and few changes."""
    count, turns, sizes, messages = 64, 4, 0, 0
    iids = [f"d{number}" for number in range(10, 10 + count)]
    served.later(1.0)
    for first in range(0, count, turns):
        for iid in iids[first : first + turns]:
            served.tell(ready(iid, "decode"), PeerUp(iid))
        messages, sizes = counted(served.later(0.005), messages, sizes)
    messages, sizes = counted(served.later(0.1), messages, sizes)
    record = len(encode(ready("d10", "decode")))
    assert messages <= 4 * count and sizes <= 2 * record * count**2
    for each in iids:  # all are lost at once
        served.tell(PeerDown(each))
    messages, sizes = counted(served.later(0.1), 0, 0)
    assert messages == 4 and sizes <= 4 * 8 * count


def counted(actions, messages, sizes):
    found = sent(actions, kind=Membership)
    return messages + len(found), sizes + sum(len(encode(each)) for each in found)


@pytest.mark.parametrize("seed", range(5))
def test_all_learn_the_same_whatever_is_lost(served, seed):
    """Every message to a worker is lost with a probability of a third, until the changes are over."""
    rng = Random(seed)
    workers = {iid: Peers(identity(iid, "prefill")) for iid in ("p1", "p2", "d1", "d2")}
    for turn in range(60):
        if turn < 30:
            change = f"d{rng.randrange(3, 6)}"
            served.tell(rng.choice([ready(change, "decode", rng.randrange(9)), PeerDown(change)]))
        actions = served.later(0.06)
        for iid, peers in workers.items():
            for message in sent(actions, iid, Membership):
                if turn >= 30 or rng.random() < 2 / 3:
                    peers.update(message)
                    if peers.behind:
                        served.tell(ready(iid, PHASES[iid[0]]))
    live = {iid: member.instance for iid, member in served.core.members.by_iid.items() if member.lost is None}
    for iid, peers in workers.items():
        assert peers.instances == {other: each for other, each in live.items() if other != iid} and not peers.behind


def test_whoever_is_given_up_is_no_longer_written_to():
    made = members(("p0", "prefill"), ("d0", "decode"))
    made.lose(made.by_iid["d0"], "silent")  # its connection stands all the same
    assert made.prune(FORGET_S + 1) == [Disconnect("d0")]
    assert [send.peer for send in made.publish(FORGET_S + 1)] == ["p0"]


@pytest.fixture
def served():
    return serving("p1", "p2", "d1", "d2")


def lost(told):
    return [each.iid for each in told.status().instances if each.state == "lost"]


def test_silence_is_a_loss_and_any_message_a_sign_of_life(served):
    served.later(4.0)
    served.tell(heartbeat("p1"))
    served.later(2.0)
    assert lost(served) == []  # it may have been the broker that did not listen
    served.later(0.2)
    assert lost(served) == ["d1", "d2", "p2"] and served.status().counters["workers_lost"] == 3


def test_a_restarted_worker_loses_what_it_had(served):
    served.tell(submit())
    assert assigned(served.tell(ready("p1", "prefill", incarnation=2))) == [("p2", RID, 2)]
    assert not served.tell(staged("p1", RID, Stage.PREFILL))  # by the old one
    assert served.status().counters["workers_replaced"] == 1


def test_registering_again_loses_nothing(served):
    served.tell(submit())
    assert not assigned(served.tell(ready("p1", "prefill"))) and not served.status().counters.get("restarts")


def test_what_a_process_has_reported_stays_known_when_it_registers_again(served):
    """What it has counted so far never goes back: it would seem to do all of it again."""

    def known():
        (status,) = [each for each in served.status().instances if each.iid == "p1"]
        return status.activity.steps, status.counters, status.slots_used

    served.tell(heartbeat("p1", role="prefill", activity=Activity(steps=7), counters={"adopted": 3}, slots_used=2))
    served.tell(ready("p1", "prefill"))
    assert known() == (7, {"adopted": 3}, 2)
    served.tell(PeerDown("p1"), ready("p1", "prefill"), PeerUp("p1"))
    assert known() == (7, {"adopted": 3}, 2)
    served.tell(ready("p1", "prefill", incarnation=2))
    assert known() == (0, {}, 0)


def test_a_lost_worker_gets_nothing_until_it_is_heard_over_a_new_connection(served):
    lost = [PeerDown("p1"), PeerDown("p2"), submit(), heartbeat("p1"), PeerUp("p1")]
    assert not assigned(served.tell(*lost))
    assert assigned(served.tell(FromWorker(iid="p1", incarnation=1))) == [("p1", RID, 1)]


def test_unknown_workers_are_not_heard(served):
    assert not served.tell(heartbeat("p9"), tokens("p9", RID, 0, 1), PeerDown("p9"))


def test_rosters_are_numbered_and_leave_out_the_lost(served):
    (whole,) = sent(served.later(0.1), "d1", Membership)
    assert [each.iid for each in whole.instances] == ["p1", "p2", "d1", "d2"] and whole.since is None
    served.tell(PeerDown("p1"))
    (first,) = sent(served.later(0.1), "d1", Membership)
    assert (first.since, first.number, first.instances, first.gone) == (whole.number, whole.number + 1, [], ["p1"])
    assert sent(served.later(0.1), "d1", Membership) == []  # nothing is new
    assert served.core.deadline() == pytest.approx(served.now + 0.1)
    (later,) = [membership for _ in range(8) for membership in sent(served.later(0.1), "d1", Membership)]
    assert (later.since, later.number, later.epoch) == (first.number, first.number, 42)


def test_a_worker_lost_for_long_is_given_up(served):
    served.tell(PeerDown("p2"))
    assert not only(served.later(599.0), Disconnect)
    assert only(served.later(2.0), Disconnect) == [Disconnect("p2")] and "p2" not in served.roles()


def test_what_a_worker_says_of_nobody_is_ignored(served):
    assert not served.tell(tokens("p1", "nobody", 0, 1), failed("p1", "nobody", retry=True))


def test_pairs_are_those_in_service_and_the_same_object_until_a_change():
    made = members(("p1", "prefill"), ("d1", "decode"), ("m1", "mixed"), ("d2", "decode", {"fingerprint": OTHER}))
    made.ready(ready("d3", "decode"), 0.0)  # not connected yet
    pairs = made.pairs()
    assert pairs == [("p1", "d1"), ("p1", "m1"), ("m1", "d1"), ("m1", "m1")] and made.pairs() is pairs
    made.lose(made.by_iid["d1"], "gone")
    assert made.pairs() == [("p1", "m1"), ("m1", "m1")]
    made.connected("d3")
    made.turn(made.by_iid["m1"], "prefill")
    assert made.pairs() == [("p1", "d3"), ("m1", "d3")]
    made.disconnected("d3")
    assert made.pairs() == []


# ---------------------------------------------------------------- what a broker makes of views


def adaptive_cluster():
    """Of three adaptive instances, a0 keeps to prefill; prefill gets no time at a1."""
    made = serving()
    for iid in ("a0", "a1", "a2"):
        made.tell(ready(iid, "auto"), PeerUp(iid))
    made.tell(autos(1, a0=busy(), a1=busy(0.0), a2=busy(0.3)).changed(keeps={"a0": "prefill"}))
    return made


def placed(made, *names, **changes):
    """Where these requests go."""
    actions = [action for name in names for action in made.tell(submit(name, **changes))]
    return [action.peer for action in only(actions, Send) if isinstance(action.message, Assign)]


def test_an_instance_that_keeps_to_prefill_gets_the_prompts_and_the_status_says_so():
    made = adaptive_cluster()
    assert placed(made, "x", "y", slo=Slo(ttft_s=5.0)) == ["a0", "a0"]
    assert {each.iid: each.keeps for each in made.status().instances} == {"a0": "prefill", "a1": "", "a2": ""}


def test_a_view_after_which_none_comes_counts_no_more():
    made = adaptive_cluster()
    made.later(OLD_S + 1)
    assert {each.keeps for each in made.status().instances} == {""}
    assert {*placed(made, "x", "y", "z", slo=Slo(ttft_s=5.0))} == {"a0", "a1", "a2"}


def test_requests_without_a_limit_are_shared_out():
    made = adaptive_cluster()
    made.tell(autos(2, a0=busy(), a1=busy(), a2=busy()))
    assert {*placed(made, "x", "y", "z")} == {"a0", "a1", "a2"}
