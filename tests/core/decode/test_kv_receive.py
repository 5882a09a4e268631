"""Chunks on their way into a decode instance: what is taken, again, and counted."""

import pytest

from tests.core.build import (
    capacity,
    chunk,
    close,
    drop,
    hand_over,
    handle,
    instance,
    offer,
    reach,
)
from tests.core.driver import working
from tests.core.reading import kinds, only, sent
from tetri.core.actions import Adopt, Broken
from tetri.core.decode.kv_receive import COUNTED, FETCH_TRIES, LOST_PAUSE_S, KVReceive
from tetri.core.decode.request import KVInflow
from tetri.core.instance.activity import ActivityLog
from tetri.wire.events import PeerDown
from tetri.wire.handover import Grant, Landed, Refuse
from tetri.wire.messages import Tokens


def start(path="stream"):
    told = working("d1", *others(path), reach=reach("d1", paths=[path]))
    told.far = True
    return told


def others(path="stream", incarnation=1):
    return [instance(iid, "prefill", incarnation, reach=reach(iid, paths=[path])) for iid in ("p1", "p2")]


@pytest.fixture
def told():
    """Offer and three chunks of one request; its blocks are there, and all three are on their way."""
    told = start()
    begin(told)
    return told


def begin(told, **who):
    told.tell(offer("r", prompt=12, **who))
    told.step()
    return told.tell(*(chunk("r", i, i, i + 1, token=7 if i == 2 else None, **who) for i in range(3)))


def counted(told):
    """Those that are not 0."""
    return {name: count for name, count in told.heartbeat().counters.items() if count}


def whys(actions):
    return [(refused.why, refused.corrupt) for refused in sent(actions, kind=Refuse)]


def test_each_chunk_is_taken_once_and_lands_when_it_has_come(told):
    assert kinds(told.come(1)) == ["Landed > p1"] and kinds(told.come(0)) == ["Landed > p1"]
    assert kinds(told.come(2)) == ["Landed > p1", "Staged > broker"]
    assert counted(told) == {}


def test_a_chunk_that_is_on_its_way_is_not_taken_twice(told):
    assert not told.tell(chunk("r", 1, 1, 2))
    told.come(1)
    assert kinds(told.tell(chunk("r", 1, 1, 2))) == ["Landed > p1"]
    assert counted(told) == {"duplicate": 2}


def test_chunks_out_of_order_are_taken_as_they_come():
    told = start()
    told.tell(offer("r", prompt=12))
    told.tell(chunk("r", 1, 1, 2), chunk("r", 0, 0, 1), chunk("r", 2, 2, 3, token=7))
    assert told.heartbeat().counters == {**dict.fromkeys(COUNTED, 0), "reordered": 1}
    taken = only(told.step(), Adopt)
    assert [(take.index, take.peer, take.path) for take in taken] == [(i, "p1", "stream") for i in (1, 0, 2)]


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"attempt": 1}, "old_attempt"),
        ({"attempt": 2, "offer": 9}, "late"),
        ({"attempt": 3}, "late"),
        ({"attempt": 2, "rid": "x"}, "late"),
    ],
)
def test_a_chunk_of_another_offer_is_dropped(changes, name):
    told = start()
    begin(told, attempt=2)
    stray = chunk(**{"rid": "r", "index": 0, "start": 0, "stop": 1, **changes})
    assert kinds(told.tell(stray)) == ["Refuse > p1"] and counted(told) == {name: 1}
    assert kinds(told.come(0, key="d:r:2:p1:1")) == ["Landed > p1"]


def test_what_comes_again_of_an_earlier_offer_does_not_disturb_what_moves():
    told = start()
    old = [offer("r", prompt=12), chunk("r", 0, 0, 1), drop("r")]
    told.tell(*old)
    begin(told, offer=2)
    assert kinds(told.tell(*old)) == ["Refuse > p1", "Refuse > p1"]
    answers = [answer for index in range(3) for answer in told.come(index, key="d:r:1:p1:2")]
    assert kinds(answers) == ["Landed > p1"] * 3 + ["Staged > broker"]
    assert {answer.offer for answer in sent(answers, "p1")} == {2}


@pytest.mark.parametrize(
    "made, name", [(handle(0), "truncated"), (handle(0, 1, 2), "misfit"), (handle(0, 1, segment="s-p2"), "foreign")]
)
def test_a_chunk_that_cannot_be_one_ends_its_offer(made, name):
    told = start()
    told.tell(offer("r", prompt=12))
    actions = told.tell(chunk("r", 0, 0, 2, handle=made))
    assert kinds(actions) == ["Refuse > p1", "CancelRequest"] and counted(told) == {name: 1}
    assert not only(actions, Adopt) and whys(actions)[0][0].startswith("the chunk does not fit its offer")


@pytest.mark.parametrize("problem", ["flipped", "truncated"])
def test_a_wrong_copy_is_taken_again_at_once_and_heals(told, problem):
    for _ in range(FETCH_TRIES - 1):
        (again,) = told.come(1, problem)
        assert isinstance(again, Adopt) and (again.index, again.start) == (1, 1)
    assert kinds(told.come(1)) == ["Landed > p1"]
    assert counted(told) == {problem: FETCH_TRIES - 1, "refetched": FETCH_TRIES - 1, "healed": 1}


def test_a_copy_that_stays_wrong_ends_the_attempt(told):
    told.come(0)
    told.come(2)
    for _ in range(FETCH_TRIES - 1):
        told.come(1, "flipped")
    actions = told.come(1, "flipped")
    assert whys(actions) == [("chunk 1 is flipped", True)] and kinds(actions)[1:] == ["CancelRequest"]
    assert counted(told) == {"flipped": FETCH_TRIES, "refetched": FETCH_TRIES - 1, "given_up": 1}


def test_what_was_lost_on_a_far_path_is_taken_again_after_a_pause(told):
    assert not told.come(1, "lost")
    told.later()
    assert told.core.deadline() <= told.now + LOST_PAUSE_S
    assert not only(told.later(0.9 * LOST_PAUSE_S), Adopt)
    (again,) = only(told.later(0.2 * LOST_PAUSE_S), Adopt)
    assert again.index == 1
    told.come(1, "lost")
    assert not only(told.later(1.5 * LOST_PAUSE_S), Adopt)  # the second pause is longer
    assert only(told.later(0.6 * LOST_PAUSE_S), Adopt)
    assert kinds(told.come(1)) == ["Landed > p1"]
    assert counted(told) == {"lost": 2, "refetched": 2, "healed": 1}


def test_what_stays_lost_on_a_far_path_may_be_had_by_another_instance(told):
    for _ in range(FETCH_TRIES - 1):
        told.come(1, "lost")
        told.later(3 * LOST_PAUSE_S)
    assert not told.come(1, "lost") and not told.come(0)
    assert whys(told.come(2)) == [("chunk 1 is lost", False)]


@pytest.mark.parametrize("problem", ["lost", "foreign"])
def test_what_cannot_be_read_here_the_next_time_either_is_not_taken_again(problem):
    told = start("shm")
    begin(told)
    told.come(0)
    told.come(2)
    (refused,) = sent(told.come(1, problem), kind=Refuse)
    assert (refused.why, refused.unread, refused.corrupt) == (f"chunk 1 is {problem}", True, False)
    assert counted(told) == {problem: 1, "given_up": 1}


def test_transfers_that_fail_in_a_row_are_reported_if_they_come_from_several_instances():
    told, reported = working("d1", "p1", "p2", capacity=capacity(blocks=40, context=100)), []
    for number, src in enumerate(("p1", "p1", "p2", "p1")):
        told.trouble = {0: ["lost"]}
        told.land(f"r{number}", number=number + 1, src=src)
        reported.append(told.load().unread)
    assert reported == [0, 0, 3, 4]
    told.tell(PeerDown("p2"))
    assert told.load().unread == 0  # now it may be the other side
    told.trouble = {0: ["lost"]}
    told.land("x", number=9, src="p2")
    assert told.load().unread == 4
    told.land("y", number=10, src="p2")
    assert told.load().unread == 0


def test_the_leg_stays_until_the_last_copy_has_come(told):
    told.come(0, "foreign")
    assert not told.come(1, "flipped") and not told.tell(chunk("r", 0, 0, 1))  # nothing more is taken
    actions = told.come(2)
    assert kinds(actions) == ["Refuse > p1", "CancelRequest"] and told.load().free_blocks == 10


def test_a_pause_ends_with_its_offer(told):
    told.come(1, "lost")
    told.come(2, "foreign")
    assert sent(told.come(0), kind=Refuse)
    assert not only(told.later(5 * LOST_PAUSE_S), Adopt)


@pytest.mark.parametrize("end", [close("r"), drop("r"), PeerDown("p1")], ids=["close", "drop", "down"])
def test_what_comes_for_a_leg_that_is_no_more_is_nothing(told, end):
    assert kinds(told.tell(end)) == ["CancelRequest"]
    assert not told.come(0) and not told.come(1, "lost") and not told.come(2, "flipped")
    assert counted(told) == {}
    with pytest.raises(Broken, match="nobody took chunk 0"):
        told.come(0)


def test_the_same_offer_again_waits_for_what_the_earlier_one_has_on_its_way(told):
    """Its leg would have the same key, and its blocks must not get what was taken for others."""
    told.tell(PeerDown("p1"))
    told.come(0)
    assert whys(told.tell(offer("r", prompt=12))) == [("KV that it brought before is still on its way", False)]
    told.come(1)
    told.come(2)
    assert sent(told.tell(offer("r", prompt=12)), kind=Grant)


def test_an_offer_under_another_number_takes_its_own_copies(told):
    told.come(0)
    assert len(only(begin(told, offer=2), Adopt)) == 3
    assert not told.come(1)  # of the first offer
    landed = sent(told.come(1, key="d:r:1:p1:2"), kind=Landed)
    assert [(each.offer, each.index) for each in landed] == [(2, 1)]
    assert not told.come(2, "flipped")


def test_the_receipt_tells_how_often_a_chunk_was_taken_again():
    told = start()
    told.land(prompt=4, max_tokens=2)
    told.come(0, "flipped")
    told.come(0)
    (last,) = sent(told.step(), kind=Tokens)
    receipt = last.items[0].end.receipt
    assert (receipt.refetched, receipt.transport) == (1, "stream")


def test_of_several_copies_none_meets_a_leg_that_is_gone():
    """Near by, where one Adopt is carried out after the other."""
    told = working("d1", "p1")
    told.trouble = {0: ["lost"], 2: ["flipped"]}
    told.tell(offer("r", prompt=12), *(chunk("r", i, i, i + 1, token=5 if i == 2 else None) for i in range(3)))
    actions = told.step()
    assert kinds(actions)[1:] == ["Adopt"] * 3 + ["Refuse > p1", "CancelRequest"]
    assert whys(actions) == [("chunk 0 is lost", False)]


def inflow(blocks):
    return KVInflow(blocks, "shm", "s-p1")


def test_the_token_comes_with_the_last_chunk_whichever_comes_first():
    receiving, made = KVReceive(ActivityLog(0.0)), hand_over(offer("r", prompt=8))
    assert receiving.announced(chunk("r", 1, 1, 2, token=5), made) is None and made.tokens == [5]
    made.flow.land(1)
    assert not made.flow.complete
    assert receiving.announced(chunk("r", 0, 0, 1), made) is None and made.tokens == [5]
    made.flow.land(0)
    assert made.flow.complete and made.flow.bytes == 64


@pytest.mark.parametrize(
    "wrong",
    [
        chunk("r", 1, 0, 2),  # over the first
        chunk("r", 1, -1, 1),
        chunk("r", 1, 2, 3, token=7),  # not the last
        chunk("r", 1, 2, 4),  # the last without the first token
        chunk("r", 1, 3, 5, token=7),
        chunk("r", 1, 3, 3),
    ],
)
def test_a_chunk_must_be_one_of_its_prompt(wrong):
    flow = inflow(4)
    first, last = chunk("r", 0, 0, 2), chunk("r", 1, 2, 4, token=7)
    assert flow.obstacle(first, 1) is None
    flow.announce(first)
    assert flow.obstacle(wrong, 1)[0] == "misfit" and flow.obstacle(last, 1) is None
    flow.land(0)
    assert flow.obstacle(wrong, 1)[0] == "misfit" and flow.obstacle(last, 1) is None


def test_check_finds_chunks_that_nobody_takes_and_pauses_of_legs_that_are_no_more():
    receiving, made = KVReceive(ActivityLog(0.0)), hand_over(offer("r", prompt=12))
    made.ready = True
    receiving.announced(chunk("r", 0, 0, 1), made)
    with pytest.raises(Broken, match="r waits for 0 of 1 chunks"):
        receiving.check([made])
    receiving.fetch(chunk("r", 0, 0, 1), made)
    receiving.check([made])
    receiving.pauses["d:x:1:p1:1", 0] = 1.0
    with pytest.raises(Broken, match="hand-overs that are gone"):
        receiving.check([made])
