"""The running batch of a decode instance: admission, several steps in one go, what is told when."""

import pytest

from tests.core.build import capacity, chunk, kinds, offer, only, sent
from tests.core.test_decode import KEY, decode_key, start
from tetri.core.actions import BROKER, AdmitRequest, Broken, Step
from tetri.cost import Cost
from tetri.engine_request import Sampled, Span, StepDone
from tetri.policy import rules as tables
from tetri.policy.rules import Rules
from tetri.policy.views import BatchMember, WaitingRequest
from tetri.request import LengthRange, Sampling
from tetri.wire.messages import Close, Resend, Tokens

LARGE = capacity(blocks=60, context=200, max_batch=4)
LONG = Sampling(max_tokens=60)


def running(*rids, interval=1, **changes):
    """A worker in whose batch these requests run, with one token each: the first."""
    told = start(**{"stream_interval": interval, "capacity": LARGE, "reserve_share": 1.0, **changes})
    for number, rid in enumerate(rids, 1):
        told.land(rid, number=number, sampling=LONG)
    return told


def run(told, steps, *ended, keys=None, preempted=()):
    """Plan, and let the engine make so many steps; `ended` are (key, tokens, reason)."""
    planned = told.later()
    assert isinstance(planned[-1], Step) and planned[-1].most >= steps, planned[-1]
    keys = list(told.core.decode.batch.running) if keys is None else keys
    tokens = [Sampled(key, (7,) * steps, None) for key in keys if key not in [each[0] for each in ended]]
    tokens += [Sampled(key, (7,) * count, reason) for key, count, reason in ended]
    spans = tuple(Span(key, 90, 90 + steps) for key in keys)
    done = StepDone(spans=spans, tokens=tuple(tokens), steps=steps, preempted=tuple(preempted))
    return planned + told.tell(done)


def land_beside(told, rid, number, **changes):
    """Another request lands while the batch runs on."""
    told.tell(offer(rid, offer=number, sampling=LONG, **changes))
    told.later()
    spans = tuple(Span(key, 90, 91) for key in told.core.decode.batch.running)
    request = told.core.decode.requests[decode_key(rid, number)]
    told.tell(StepDone(spans=spans, allocated=(request.key,)))
    told.tell(chunk(rid, 0, 0, request.flow.blocks, token=5, offer=number))


def items(actions):
    told = [item for tokens in sent(actions, kind=Tokens) for item in tokens.items]
    return [(item.rid, item.start, len(item.ids), item.end and item.end.reason) for item in told]


# ---------------------------------------------------------------- how far a step goes


def test_a_step_goes_no_further_than_tokens_are_to_be_sent():
    assert running("r").later()[-1] == Step(1)
    assert running("r", interval=5).later()[-1] == Step(5)


def test_a_step_ends_where_the_first_range_is_moved_up():
    told = start(stream_interval=50, capacity=LARGE, rules=Rules(length="noisy"), reserve_share=1.0)
    told.land("a", sampling=LONG, length=LengthRange(low=4, high=8))
    told.land("b", number=2, sampling=LONG, length=LengthRange(low=0, high=30))
    assert run(told, 7)[-2:] != [] and told.core.decode.requests[decode_key("a")].length == LengthRange(low=8, high=12)
    assert told.later()[-1] == Step(4)


def test_a_step_ends_when_a_beat_or_a_load_is_due():
    told = running("r", interval=50, cost=Cost(decode=((1.0, 0.03),)))
    told.later(0.1)  # the next beat is in 0.1 s
    told.tell(StepDone(spans=(Span(KEY, 8, 9),), tokens=(Sampled(KEY, (7,), None),)))
    assert told.later()[-1] == Step(4)


def test_what_the_engine_has_grown_by_is_compared_when_all_its_tokens_are_counted():
    told = running("r", interval=9)
    told.later()
    done = StepDone(spans=(Span(KEY, 8, 16),), tokens=(Sampled(KEY, (7,) * 8, None),), held=((KEY, 4),), steps=8)
    told.tell(done)
    assert told.core.ledger.free == 60 - 5
    told.later()
    with pytest.raises(Broken, match="the engine holds 9 blocks"):
        told.tell(StepDone(spans=(Span(KEY, 16, 18),), tokens=(Sampled(KEY, (7, 7), None),), held=((KEY, 9),), steps=2))


# ---------------------------------------------------------------- what is told when


def test_tokens_are_held_back_until_the_interval_is_reached():
    told = running("a", "b", interval=5)
    assert items(run(told, 3)) == []
    assert [hold.outputs for hold in told.core.decode.holds()] == [1, 1]
    assert items(run(told, 2)) == [("a", 1, 5, None), ("b", 1, 5, None)]
    assert [hold.outputs for hold in told.core.decode.holds()] == [6, 6]


def test_all_that_was_held_back_is_told_before_the_end():
    told = running("a", "b", interval=9)
    actions = run(told, 2, (decode_key("a"), 2, "stop"))
    assert items(actions) == [("a", 1, 2, "stop")] and kinds(actions)[-1] == "Tokens > broker"
    assert [(hold.rid, hold.outputs) for hold in told.core.decode.holds()] == [("a", 3), ("b", 1)]


def test_what_is_preempted_tells_what_it_has():
    told = running("a", "b", interval=9)
    run(told, 2)
    actions = run(told, 1, keys=[decode_key("a")], preempted=[decode_key("b", 2)])
    assert items(actions) == [("b", 1, 2, None)]
    run(told, 1, keys=[decode_key("a")], preempted=[decode_key("b", 2)])
    assert list(told.core.decode.batch.preempted) == [decode_key("b", 2)]
    run(told, 1)
    assert not told.core.decode.batch.preempted


def test_asking_again_gets_all_and_nothing_is_told_twice():
    told = running("r", interval=5)
    run(told, 3)
    assert items(told.tell(Resend(rid="r", attempt=1, start=1))) == [("r", 1, 3, None)]
    assert items(run(told, 2)) == []
    assert items(run(told, 3)) == [("r", 4, 5, None)]


def test_a_token_of_one_that_does_not_run_must_not_go_on():
    told = running("r")
    told.later()
    with pytest.raises(Broken, match="a token for d:x:1:p1:1, which was not admitted"):
        told.core.handle(StepDone(tokens=(Sampled("d:x:1:p1:1", (5,), None),)), 0.0)


# ---------------------------------------------------------------- admission


class Asked:
    """An admission policy that remembers what it was asked, and says what the test says."""

    def __init__(self):
        self.calls, self.answer = [], []

    def __call__(self, waiting, batch):
        self.calls.append((list(waiting), batch))
        return [request.key for request in waiting if request.key in self.answer]


@pytest.fixture
def asked(monkeypatch):
    policy = Asked()
    monkeypatch.setitem(tables.ADMISSIONS, "asked", policy)
    return policy


def test_the_policy_sees_the_batch_with_its_predicted_ends(asked):
    told = start(capacity=LARGE, rules=Rules(admit="asked", admit_end="low"), reserve_share=1.0)
    told.land("a", sampling=LONG, length=LengthRange(low=5, high=9))
    run(told, 1)
    land_beside(told, "b", 2, prompt=4)
    told.later()
    ((waiting, batch),) = asked.calls[1:]
    assert waiting == [WaitingRequest(decode_key("b", 2), 2, 1, 5, 4 + 2)]
    assert batch.running == [BatchMember(8 + 2, 8 + 5)] and (batch.max_batch, batch.block_tokens) == (4, 4)
    assert batch.free_blocks == told.core.ledger.free


def test_the_policy_is_asked_again_only_when_something_has_changed(asked):
    told = start(capacity=LARGE, rules=Rules(admit="asked"), reserve_share=1.0)
    told.land("a", sampling=LONG)
    run(told, 1)
    land_beside(told, "b", 2, prompt=8)
    before = len(asked.calls)
    for _ in range(3):
        run(told, 1)
    assert len(asked.calls) == before + 1  # what runs grows as was predicted
    asked.answer = [decode_key("b", 2)]
    told.tell(Close(rid="a", attempt=1))
    assert only(told.later(), AdmitRequest) == [AdmitRequest(decode_key("b", 2), 5)]


def test_the_policy_is_asked_again_when_there_is_more_memory(asked):
    told = start(capacity=LARGE, rules=Rules(admit="asked"), reserve_share=1.0)
    told.land("a", sampling=LONG)
    run(told, 1)
    land_beside(told, "b", 2, prompt=8)
    told.tell(offer("c", prompt=8, offer=3))
    run(told, 1)
    before = len(asked.calls)
    run(told, 1)
    assert len(asked.calls) == before
    told.tell(Close(rid="c", attempt=1))
    run(told, 1)
    assert len(asked.calls) == before + 1


def test_a_full_batch_asks_nobody(asked):
    asked.answer = [decode_key("a")]
    told = start(capacity=capacity(blocks=60, context=200, max_batch=1), rules=Rules(admit="asked"), reserve_share=1.0)
    told.land("a", sampling=LONG)
    run(told, 1)
    land_beside(told, "b", 2, prompt=8)
    before = len(asked.calls)
    run(told, 1)
    assert len(asked.calls) == before


# ---------------------------------------------------------------- what must not be


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (lambda batch, request: setattr(request, "allocated", False), "runs without its KV"),
        (lambda batch, request: request.tokens.extend([1] * 60), "runs past max_tokens"),
        (lambda batch, request: setattr(request, "mark", 9), "is to be looked at when it has 9"),
        (lambda batch, request: batch.landed.update(x=request), "wait for admission"),
        (lambda batch, request: batch.preempted.update(x=request), "are in the batch"),
    ],
)
def test_check_finds_what_is_wrong(spoil, complaint):
    told = running("r")
    run(told, 1)
    batch = told.core.decode.batch
    batch.check()
    spoil(batch, batch.running[KEY])
    with pytest.raises(Broken, match=complaint):
        batch.check()


def test_a_seat_that_is_not_where_it_should_be_is_found():
    told = running("r")
    half = told.core.decode
    request = half.requests[KEY]
    half.moving[KEY] = request
    with pytest.raises(Broken, match="is not where a seat in waiting is"):
        half.check()
    del half.moving[KEY]
    half.moving["gone"] = request
    with pytest.raises(Broken, match="seats that are no more are still counted"):
        half.check()


def test_nothing_that_the_broker_is_told_goes_elsewhere():
    told = running("r")
    assert all(action.peer == BROKER for action in run(told, 1) if hasattr(action, "peer"))
    told.tell(offer("s", prompt=8, offer=2, src="p2"))
    assert kinds(told.tell(chunk("s", 0, 0, 1, offer=2, src="p2"))) == []
