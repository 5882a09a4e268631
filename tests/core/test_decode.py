"""The decode half, told through the worker's core: offers, chunks that land, admission, tokens, letting go."""

from random import Random

import pytest
from tetri.core.worker.peer_events import MOST_EARLY

from tests.core.build import (
    Told,
    capacity,
    chunk,
    drop,
    fingerprint,
    handle,
    identity,
    instance,
    kinds,
    membership,
    offer,
    only,
    reach,
    sent,
)
from tetri.core.actions import (
    BROKER,
    AddRequest,
    AdmitRequest,
    Adopt,
    Adopted,
    Broken,
    CancelRequest,
    RequestRejected,
    Step,
)
from tetri.core.worker.worker import Worker
from tetri.engine_request import Sampled, Span, StepDone
from tetri.policy.rules import Rules
from tetri.request import Sampling
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.handover import Grant, Landed, Refuse
from tetri.wire.messages import Close, Heartbeat, Resend, Staged, TokenItem, Tokens


class Decoding(Told):
    """Adopts whatever it is told to, unless `trouble` has a problem for that (key, index), used up in order."""

    def __init__(self, core):
        super().__init__(core)
        self.trouble = {}

    def result(self, action):
        if not isinstance(action, Adopt):
            return super().result(action)
        problems = self.trouble.get(action.index, [])
        return Adopted(action.key, action.index, problems.pop(0) if problems else None)

    def allocate(self, *keys):
        """A step in which the engine only allocates."""
        assert isinstance(self.later()[-1], Step)
        return self.tell(StepDone(allocated=keys))

    def land(self, rid, prompt=8, number=1, **changes):
        """Offer, allocate and hand over `prompt` tokens and the first token 5."""
        self.tell(offer(rid, prompt, offer=number, **changes))
        request = self.core.decode.requests[f"d:{rid}:1:p1:{number}"]
        self.allocate(request.key)
        return self.tell(chunk(rid, 0, 0, request.flow.blocks, token=5, offer=number))

    def step(self, *tokens, spans=None, preempted=()):
        """Plan and run a step that yields (key, token, reason)."""
        planned = self.later()
        assert isinstance(planned[-1], Step), kinds(planned)
        if spans is None:
            spans = [Span(key, 90, 91) for key, _, _ in tokens]
        sampled = tuple(Sampled(key, (token,), reason) for key, token, reason in tokens)
        return planned + self.tell(StepDone(tuple(spans), sampled, (), tuple(preempted)))


def start(**changes):
    told = Decoding(Worker(identity("d1", "decode", **changes), Random(1), now=0.0))
    told.later()
    told.tell(membership(1, instance("p1", "prefill"), instance("p2", "prefill"), instance("d1", "decode")))
    told.tell(PeerUp("p1"))
    told.later()
    return told


@pytest.fixture
def decode():
    told = start()
    yield told
    told.core.check()


KEY = "d:r:1:p1:1"


def why(actions):
    (refused,) = sent(actions, kind=Refuse)
    return refused.why


# ---------------------------------------------------------------- offers


def test_an_offer_is_granted_and_its_blocks_reserved(decode):
    actions = decode.tell(offer("r", prompt=14, output=[5, 6]))
    assert kinds(actions) == ["AddRequest", "Grant > p1"]
    (added,) = only(actions, AddRequest)
    assert (added.request.key, added.request.phase, len(added.request.tokens), added.request.output_from) == (
        KEY,
        "decode",
        16,
        14,
    )
    assert decode.core.ledger.free == 6 and decode.core.reporter.load().waiting == 1


def test_the_same_offer_again_is_granted_again(decode):
    decode.tell(offer("r", prompt=8))
    assert kinds(decode.tell(offer("r", prompt=8))) == ["Grant > p1"] and decode.core.ledger.free == 8


@pytest.mark.parametrize("newer", [{"offer": 2}, {"attempt": 2}, {"src": "p2"}])
def test_a_newer_offer_replaces_the_older(decode, newer):
    decode.tell(offer("r", prompt=8))
    actions = decode.tell(offer("r", prompt=8, **newer))
    assert [kind.split(" > ")[0] for kind in kinds(actions)] == ["CancelRequest", "AddRequest", "Grant"]
    assert len(decode.core.decode.requests) == 1 and decode.core.ledger.free == 8


@pytest.mark.parametrize("unknown", [{"src": "p3"}, {"incarnation": 2}])
def test_what_an_instance_says_that_no_roster_has_told_of_waits_for_the_next(decode, unknown):
    """Where it is, and how its slab can be read, is not known yet: no answer would reach it."""
    assert not decode.tell(offer("r", prompt=8, **unknown), chunk("r", 0, 0, 1, **unknown), offer("x", 4, **unknown))
    assert not decode.tell(drop("x", **unknown))
    assert not sent(decode.tell(membership(2, instance("p1", "prefill"))))
    actions = decode.tell(
        membership(3, *(instance(iid, "prefill", unknown.get("incarnation", 1)) for iid in ("p1", "p3")))
    )
    assert [type(each).__name__ for each in sent(actions)] == ["Grant", "Grant"]
    (request,) = decode.core.decode.requests.values()
    assert request.offer.rid == "r" and list(request.flow.announced) == [
        0
    ]  # the drop was heard too, and after its offer


def test_of_too_many_early_messages_the_oldest_are_forgotten(decode):
    for number in range(MOST_EARLY + 1):
        decode.tell(offer(f"r{number}", prompt=4, src="p3", offer=number + 1))
    answers = sent(decode.tell(membership(2, instance("p3", "prefill"))), "p3")
    assert len(answers) == MOST_EARLY and answers[0].rid == "r1"
    assert not sent(decode.tell(membership(3, instance("p3", "prefill"))), "p3")


def test_an_instance_without_a_common_path_is_refused(decode):
    decode.tell(membership(2, instance("p1", "prefill", reach=reach("p1", host="elsewhere"))))
    assert "no path to its KV" in why(decode.tell(offer("r", prompt=8)))


def test_an_offer_of_an_older_attempt_is_refused(decode):
    decode.tell(offer("r", prompt=8, attempt=2))
    assert why(decode.tell(offer("r", prompt=8))) == "a later attempt is here"


def test_what_has_all_landed_is_granted_under_any_number(decode):
    decode.land("r")
    assert kinds(decode.tell(offer("r", prompt=8, offer=7))) == ["Grant > p1"]
    (answer,) = sent(decode.tell(chunk("r", 0, 0, 2, offer=7)))
    assert isinstance(answer, Landed) and answer.offer == 7


@pytest.mark.parametrize(
    "wrong, reason",
    [
        ({"fingerprint": fingerprint(dtype="f32")}, "dtype differs"),
        ({"prompt": 0, "blocks": 0}, "0 tokens are not 0 blocks"),
        ({"blocks": 3}, "8 tokens are not 3 blocks"),
        ({"prompt": 40, "sampling": Sampling(max_tokens=1)}, "41 tokens do not fit here"),
        ({"sampling": Sampling(max_tokens=33)}, "41 tokens do not fit here"),
    ],
)
def test_what_can_never_run_here_is_refused(decode, wrong, reason):
    actions = decode.tell(offer(**{"rid": "r", "prompt": 8, **wrong}))
    assert kinds(actions) == ["Refuse > p1"] and reason in why(actions)


def test_reservations_take_at_most_their_share(decode):
    decode.tell(offer("a", prompt=12))
    assert why(decode.tell(offer("b", prompt=12))) == "3 of 5 blocks for waiting requests are taken"
    assert kinds(decode.tell(offer("b", prompt=8, offer=2))) == ["AddRequest", "Grant > p1"]


def test_one_reservation_alone_may_be_larger_but_not_than_what_is_free(decode):
    decode.land("a", prompt=12)
    decode.step((decode_key("a"), 6, None))
    assert why(decode.tell(offer("b", prompt=28))) == "7 blocks needed, 6 free"
    assert kinds(decode.tell(offer("b", prompt=24, offer=2))) == ["AddRequest", "Grant > p1"]


def decode_key(rid, number=1):
    return f"d:{rid}:1:p1:{number}"


@pytest.mark.parametrize("admit, most", [("peak", 3), ("greedy", 7)])
def test_an_offer_leaves_to_the_batch_what_it_was_admitted_for(admit, most):
    """Of 10 blocks the running one has 3, for 9 tokens, and will have 7, for 28."""
    told = start(rules=Rules(admit=admit, admit_end="high"), reserve_share=1.0)
    told.land("a", prompt=7, sampling=Sampling(max_tokens=21))
    told.step((decode_key("a"), 6, None))
    refused = told.tell(offer("b", prompt=4 * most + 1, offer=2))
    assert why(refused).startswith(f"{most + 1} blocks needed, 7 free")
    assert sent(told.tell(offer("b", prompt=4 * most, offer=3)), kind=Grant)
    told.core.check()


def test_what_the_batch_has_taken_is_not_kept_for_it_any_more():
    """It will have 7 of 10 blocks, of which it has 3, 5, and then none."""
    told = start(rules=Rules(admit="peak", admit_end="high"), reserve_share=1.0)
    told.land("a", prompt=7, sampling=Sampling(max_tokens=21))
    told.step((decode_key("a"), 6, None))
    assert told.core.decode.batch.kept_free() == 4
    for _ in range(8):
        told.step((decode_key("a"), 6, None))
    assert told.core.decode.batch.kept_free() == 2
    told.tell(Close(rid="a", attempt=1))
    assert told.core.decode.batch.kept_free() == 0


def test_an_offer_that_the_engine_rejects_is_refused(decode):
    decode.tell(offer("r", prompt=8))
    actions = decode.tell(RequestRejected(KEY, "odd"))
    assert kinds(actions) == ["Refuse > p1"] and why(actions) == "odd" and decode.core.ledger.free == 10


# ---------------------------------------------------------------- chunks


def test_chunks_before_and_after_the_blocks_are_there(decode):
    decode.tell(offer("r", prompt=16))
    assert not decode.tell(chunk("r", 0, 0, 1))
    landed = decode.allocate(KEY)
    assert kinds(landed) == ["Adopt", "Landed > p1"] and only(landed, Adopt)[0].start == 0
    actions = decode.tell(chunk("r", 1, 1, 3), chunk("r", 2, 3, 4, token=5))
    assert kinds(actions) == ["Adopt", "Landed > p1"] * 2 + ["Staged > broker"]
    assert sent(actions, BROKER)[0].stage == "waiting"
    (hold,) = decode.core.decode.holds()
    assert (hold.rid, hold.stage, hold.outputs) == ("r", "waiting", 1)


def test_the_last_chunk_may_come_first(decode):
    decode.tell(offer("r", prompt=8))
    decode.allocate(KEY)
    assert kinds(decode.tell(chunk("r", 1, 1, 2, token=5))) == ["Adopt", "Landed > p1"]
    assert kinds(decode.tell(chunk("r", 0, 0, 1)))[-1] == "Staged > broker"


def test_a_repeated_chunk_is_answered_again_or_waited_for(decode):
    decode.tell(offer("r", prompt=16))
    assert not decode.tell(chunk("r", 0, 0, 1), chunk("r", 0, 0, 1))
    assert kinds(decode.allocate(KEY)) == ["Adopt", "Landed > p1"]
    assert kinds(decode.tell(chunk("r", 0, 0, 1))) == ["Landed > p1"]


@pytest.mark.parametrize("other", [{"rid": "x"}, {"offer": 2}, {"attempt": 2}, {"src": "p2"}], ids=str)
def test_a_chunk_of_no_offer_here_is_refused(decode, other):
    decode.tell(offer("r", prompt=8))
    assert why(decode.tell(chunk(**{"rid": "r", "index": 0, "start": 0, "stop": 1, **other}))) == "no such offer here"
    assert decode.core.decode.requests


@pytest.mark.parametrize("start_, stop, slots", [(0, 3, 3), (1, 1, 0), (-1, 1, 2), (0, 2, 1)])
def test_a_chunk_that_does_not_fit_its_offer_is_refused(decode, start_, stop, slots):
    decode.tell(offer("r", prompt=8))
    actions = decode.tell(chunk("r", 0, start_, stop, handle=handle(*range(slots))))
    assert why(actions).startswith("the chunk does not fit its offer") and not decode.core.decode.requests


def test_a_corrupt_chunk_is_copied_again(decode):
    decode.trouble = {0: ["flipped", "flipped"]}
    assert kinds(decode.land("r")) == ["Adopt"] * 3 + ["Landed > p1", "Staged > broker"]


def test_a_chunk_that_stays_corrupt_is_refused(decode):
    decode.trouble = {0: ["flipped"] * 3}
    actions = decode.land("r")
    assert kinds(actions) == ["Adopt"] * 3 + ["Refuse > p1", "CancelRequest"] and why(actions) == "chunk 0 is flipped"
    assert decode.core.ledger.free == 10


def test_a_lost_chunk_is_refused_at_once(decode):
    decode.trouble = {0: ["lost"]}
    assert why(decode.land("r")) == "chunk 0 is lost"


def test_the_leg_stays_until_the_last_copy_is_made(decode):
    decode.trouble = {0: ["lost"], 2: ["flipped"]}
    decode.tell(offer("r", prompt=12), chunk("r", 0, 0, 1), chunk("r", 1, 1, 2), chunk("r", 2, 2, 3, token=5))
    actions = decode.allocate(KEY)
    # one Adopt after the other, as the loop does it: none of them may meet a leg that is gone
    assert kinds(actions) == ["Adopt"] * 3 + ["Refuse > p1", "CancelRequest"] and why(actions) == "chunk 0 is lost"


def test_a_copy_that_nobody_made_must_not_go_on(decode):
    with pytest.raises(Broken, match="nobody took chunk 0 of d:gone"):
        decode.tell(Adopted("d:gone:1:p1:1", 0))


# ---------------------------------------------------------------- letting go


def test_a_dropped_offer_gives_its_blocks_back(decode):
    decode.tell(offer("r", prompt=8))
    assert not decode.tell(drop("r", offer=2), drop("x"))
    assert kinds(decode.tell(drop("r"))) == ["CancelRequest"] and decode.core.ledger.free == 10


def test_what_has_all_landed_cannot_be_dropped(decode):
    decode.land("r")
    assert not decode.tell(drop("r")) and decode.core.decode.requests


@pytest.mark.parametrize("gone", [PeerDown("p1"), membership(2, instance("p2", "prefill"), instance("d1", "decode"))])
def test_a_lost_prefill_instance_takes_what_it_had_not_sent_along(decode, gone):
    decode.land("a", prompt=4)
    decode.tell(offer("b", prompt=4, offer=2), offer("c", prompt=4, src="p2"))
    actions = decode.tell(gone)
    assert [action.key for action in only(actions, CancelRequest)] == [decode_key("b", 2)]
    assert len(decode.core.decode.requests) == 2


def test_a_prefill_instance_that_is_back_hears_all_again(decode):
    decode.land("a", prompt=4)
    decode.tell(offer("b", prompt=4, offer=2))
    assert kinds(decode.tell(PeerUp("p1"))) == ["Grant > p1", "Landed > p1", "Grant > p1"]


def test_beats_remind_of_grants_whose_kv_is_not_all_there(decode):
    decode.land("a", prompt=4)
    decode.tell(offer("b", prompt=4, offer=2))
    actions = decode.later(0.1)
    assert [grant.rid for grant in sent(actions, "p1", Grant)] == ["b"]
    assert [(hold.rid, hold.stage) for hold in sent(actions, kind=Heartbeat)[0].holds] == [
        ("a", "waiting"),
        ("b", "moving"),
    ]
    decode.tell(StepDone(allocated=(decode_key("b", 2),)))


@pytest.mark.parametrize("until", ["offered", "landed", "running", "ended"])
def test_closing_in_every_stage(decode, until):
    if until == "offered":
        decode.tell(offer("r", prompt=8))
    else:
        decode.land("r")
    if until in ("running", "ended"):
        decode.step((KEY, 6, "stop" if until == "ended" else None))
    assert not decode.tell(Close(rid="r", attempt=0))
    actions = decode.tell(Close(rid="r", attempt=1))
    assert kinds(actions) == ([] if until == "ended" else ["CancelRequest"])
    assert decode.core.ledger.free == 10 and not decode.core.decode.requests


# ---------------------------------------------------------------- running


def test_one_request_from_admission_to_its_end(decode):
    decode.land("r", prompt=8, sampling=Sampling(max_tokens=3))
    first = decode.step((KEY, 6, None))
    assert kinds(first) == ["AdmitRequest", "Staged > broker", "Step", "Tokens > broker"]
    assert only(first, AdmitRequest) == [AdmitRequest(KEY, 5)] and sent(first, kind=Staged)[0].stage == "decode"
    assert (sent(first, kind=Tokens)[0].items[0].start, decode.core.reporter.load().running) == (1, 1)
    assert [hold.stage for hold in decode.core.decode.holds()] == ["decode"]
    last = decode.step((KEY, 7, "length"))
    assert kinds(last) == ["Step", "Tokens > broker"]
    (item,) = sent(last, kind=Tokens)[0].items
    end = item.end
    assert (item.start, item.ids) == (2, [7])
    assert (end.reason, end.receipt.adopted, end.receipt.recomputed, end.receipt.preempted) == ("length", 8, 0, 0)
    assert (end.receipt.kv_bytes, end.receipt.chunks, end.receipt.prefill_instance) == (64, 1, "p1")
    assert decode.core.ledger.free == 10 and [hold.stage for hold in decode.core.decode.holds()] == ["done"]
    assert "Step" not in kinds(decode.later())


def test_all_tokens_of_a_step_are_one_message(decode):
    decode.land("a", prompt=4)
    decode.step((decode_key("a"), 6, None))
    decode.tell(offer("b", prompt=4, offer=2))
    decode.later()
    decode.tell(StepDone(spans=(Span(decode_key("a"), 6, 7),), allocated=(decode_key("b", 2),)))
    decode.tell(chunk("b", 0, 0, 1, token=5, offer=2))
    both = decode.step((decode_key("a"), 7, None), (decode_key("b", 2), 7, None))
    (message,) = sent(both, kind=Tokens)
    assert [(item.rid, item.start) for item in message.items] == [("a", 2), ("b", 1)]


def test_the_batch_takes_no_more_than_it_has_slots_for(decode):
    for number, rid in enumerate("abc", 1):
        decode.tell(offer(rid, prompt=4, offer=number))
    decode.allocate(*(decode_key(rid, number) for number, rid in enumerate("abc", 1)))
    for number, rid in enumerate("abc", 1):
        decode.tell(chunk(rid, 0, 0, 1, token=5, offer=number))
    actions = decode.step((decode_key("a"), 6, "stop"), (decode_key("b", 2), 6, None))
    assert [action.key for action in only(actions, AdmitRequest)] == [decode_key("a"), decode_key("b", 2)]
    assert [action.key for action in only(decode.later(), AdmitRequest)] == [decode_key("c", 3)]
    decode.tell(StepDone(spans=(Span(decode_key("c", 3), 4, 5),)))


def overdrawn(**changes):
    """`a` runs and has outgrown the memory, `b` has landed and waits."""
    told = start(capacity=capacity(blocks=4, max_batch=8), reserve_share=1.0, **changes)
    told.land("a", prompt=6, sampling=Sampling(max_tokens=9))
    told.step((decode_key("a"), 6, None))
    told.tell(offer("b", prompt=7, offer=2))
    told.later()
    told.tell(StepDone((Span(decode_key("a"), 7, 8),), (Sampled(decode_key("a"), (7,), None),), (decode_key("b", 2),)))
    told.tell(chunk("b", 0, 0, 2, token=5, offer=2))
    return told


def test_nobody_is_admitted_while_memory_is_overdrawn():
    told = overdrawn()
    assert told.core.ledger.free == -1
    assert not only(told.step((decode_key("a"), 8, None)), AdmitRequest)
    told.core.check()


def test_if_nothing_runs_the_oldest_goes_whatever_the_policy_says(decode):
    decode.land("a", prompt=20)
    decode.core.ledger.allocate("others", 7)
    assert [action.key for action in only(decode.step((decode_key("a"), 6, None)), AdmitRequest)] == [decode_key("a")]
    decode.core.ledger.close("others")


def test_if_all_that_run_are_preempted_the_oldest_that_waits_gives_its_memory():
    told = overdrawn()
    assert not only(told.step(spans=(), preempted=[decode_key("a")]), AdmitRequest)
    assert told.core.decode.stuck() and not told.core.idle
    actions = told.step((decode_key("a"), 8, None), preempted=[decode_key("b", 2)])
    assert [action.key for action in only(actions, AdmitRequest)] == [decode_key("b", 2)]
    assert not told.core.decode.stuck()
    told.core.check()


def test_preemption_shows_in_the_receipt(decode):
    decode.land("r", prompt=8, sampling=Sampling(max_tokens=4))
    decode.step((KEY, 6, None))
    decode.step(spans=(), preempted=[KEY])
    decode.tell(PeerUp("p2"))  # anything may have made room
    decode.step((KEY, 7, None), spans=[Span(KEY, 0, 10)])
    end = sent(decode.step((KEY, 8, "length")), kind=Tokens)[0].items[0].end
    assert (end.receipt.preempted, end.receipt.recomputed) == (1, 8)


def test_tokens_are_sent_again(decode):
    decode.land("r", prompt=8)
    decode.step((KEY, 6, None))
    (again,) = sent(decode.tell(Resend(rid="r", attempt=1, start=0)))
    assert again.items == [TokenItem("r", 1, 0, [5, 6])]
    assert not decode.tell(Resend(rid="r", attempt=1, start=2), Resend(rid="r", attempt=2, start=0))
    (last,) = sent(decode.step((KEY, 7, "stop")), kind=Tokens)[0].items
    (again,) = sent(decode.tell(Resend(rid="r", attempt=1, start=1)))
    assert last.end.reason == "stop" and again.items == [TokenItem("r", 1, 1, [6, 7], last.end)]
    (again,) = sent(decode.tell(Resend(rid="r", attempt=1, start=3)))
    assert again.items == [TokenItem("r", 1, 3, [], last.end)]


# ---------------------------------------------------------------- what must not be


def test_a_token_of_one_that_was_not_admitted_must_not_go_on(decode):
    decode.tell(offer("r", prompt=8))
    decode.later()
    with pytest.raises(Broken, match="was not admitted"):
        decode.core.handle(StepDone(tokens=(Sampled(KEY, (5,), None),)), 0.0)


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (lambda half, request: half._keys.clear(), "their index differ"),
        (lambda half, request: half.ledger.close(request.key), "has no account"),
        (lambda half, request: setattr(request, "landed_as", 0), "runs without its KV"),
        (lambda half, request: request.tokens.extend([1] * 8), "runs past max_tokens"),
    ],
)
def test_check_finds_what_is_wrong(spoil, complaint):
    told = start()
    told.land("r", prompt=8)
    told.step((KEY, 6, None))
    spoil(told.core.decode, told.core.decode.requests[KEY])
    with pytest.raises(Broken, match=complaint):
        told.core.decode.check()
