"""The running batch of a decode instance: admission, several passes in one go, what is told when."""

import pytest

from tests.core.build import capacity, chunk, close, offer, resend
from tests.core.driver import working
from tests.core.reading import kinds, only, sent
from tetri.core.actions import AdmitRequest, Broken, Step
from tetri.cost import Cost
from tetri.engine_request import Sampled, Span, StepDone
from tetri.policy import rules as tables
from tetri.policy.rules import Rules
from tetri.policy.views import BatchMember, WaitingRequest
from tetri.request import LengthRange
from tetri.wire.messages import Tokens

LARGE = capacity(blocks=60, context=200, max_batch=4)
LONG = 60


def begin(interval=1, **changes):
    return working("d1", "p1", **{"stream_interval": interval, "capacity": LARGE, "reserve_share": 1.0, **changes})


def landed(*rids, interval=1, **changes):
    """These are admitted with the next step."""
    told = begin(interval, **changes)
    told.land(*rids, max_tokens=LONG)
    return told


def items(actions):
    return [
        (i.rid, i.start, len(i.ids), i.end and i.end.reason)
        for tokens in sent(actions, kind=Tokens)
        for i in tokens.items
    ]


def outputs(told):
    return {rid: count for rid, _, count in told.holds()}


def test_a_step_goes_no_further_than_tokens_are_to_be_sent():
    assert landed("r").later()[-1] == Step(1)
    assert landed("r", interval=5).later()[-1] == Step(5)


def test_a_step_ends_when_a_beat_or_a_load_is_due():
    told = landed("r", interval=50, cost=Cost(decode=((1.0, 0.03),)))
    told.later(0.1)  # the next beat is in 0.1 s
    told.step()
    assert told.later()[-1] == Step(4)


def test_what_the_engine_has_grown_by_is_compared_when_all_its_tokens_are_counted():
    told = landed("r", interval=9)
    told.later()
    told.step(passes=8)
    assert told.load().free_blocks == 60 - 5
    told.later()
    with pytest.raises(Broken, match="the engine holds 9 blocks"):
        key = told.key("r")
        told.tell(StepDone((Span(key, 16, 18),), (Sampled(key, (7, 7), None),), held=((key, 9),), steps=2))


def test_tokens_are_held_back_until_the_interval_is_reached():
    told = landed("a", "b", interval=5)
    assert items(told.step(passes=3)) == [] and outputs(told) == {"a": 1, "b": 1}
    assert items(told.step(passes=2)) == [("a", 1, 5, None), ("b", 1, 5, None)] and outputs(told) == {"a": 6, "b": 6}


def test_all_that_was_held_back_is_told_before_the_end():
    told = landed("a", "b", interval=9)
    actions = told.step(passes=2, a="stop")
    assert items(actions) == [("a", 1, 2, "stop")]
    assert kinds(actions)[-1] == "Tokens > broker" and outputs(told) == {"a": 3, "b": 1}


def test_what_is_preempted_tells_what_it_has():
    told = landed("a", "b", interval=9)
    told.step(passes=2)
    assert items(told.step(preempted="b")) == [("b", 1, 2, None)]
    assert items(told.step(preempted="b")) == []
    told.step()
    assert items(told.step(passes=4)) == [("a", 1, 9, None)]


def test_asking_again_gets_all_and_nothing_is_told_twice():
    told = landed("r", interval=5)
    told.step(passes=3)
    assert items(told.tell(resend("r", 1))) == [("r", 1, 3, None)]
    assert items(told.step(passes=2)) == []
    assert items(told.step(passes=3)) == [("r", 4, 5, None)]


class Asked:
    """An admission policy that remembers what it was asked, and says what the test says."""

    def __init__(self):
        self.calls, self.answer = [], []

    def __call__(self, waiting, batch):
        self.calls.append((list(waiting), batch))
        return [each.key for each in waiting if each.key.split(":")[1] in self.answer]

    def in_step(self, told):
        """How often it is asked."""
        before = len(self.calls)
        told.step()
        return len(self.calls) - before


@pytest.fixture
def asked(monkeypatch):
    policy = Asked()
    monkeypatch.setitem(tables.ADMISSIONS, "asked", policy)
    return policy


def beside(asked, **changes):
    """`a` runs and `b` has landed: the policy was asked whether it may run too."""
    told = begin(**{"rules": Rules(admit="asked"), **changes})
    told.running("a", max_tokens=LONG)
    told.land("b", number=2, max_tokens=LONG)
    asked.in_step(told)
    return told


def test_the_policy_sees_the_batch_with_its_predicted_ends(asked):
    told = begin(rules=Rules(admit="asked", admit_end="low"))
    told.running("a", max_tokens=LONG, length=LengthRange(low=5, high=9))
    told.land("b", prompt=4, number=2, max_tokens=LONG)
    free = told.load().free_blocks
    told.later()
    ((waiting, batch),) = asked.calls[1:]
    assert waiting == [WaitingRequest("d:b:1:p1:2", 2, 1, 5, 4 + 2)]
    assert [*batch.running] == [BatchMember(8 + 3, 8 + 5)] and (batch.max_batch, batch.block_tokens) == (4, 4)
    assert batch.free_blocks == free


def test_the_policy_sees_when_the_next_token_of_a_request_is_late(asked):
    told = begin(rules=Rules(admit="asked"))
    told.running("a", max_tokens=LONG)
    told.now = 50.0
    told.land("b", number=2, max_tokens=LONG, tpot_s=3.0)
    told.land("c", number=3, max_tokens=LONG)
    told.tell(offer("d", prompt=8, offer=4, tpot_s=3.0))
    told.step()
    told.tell(chunk("d", 0, 0, 2, token=5, offer=4, decoded_s=7.0))  # its KV has waited elsewhere
    told.now = 60.0
    asked.in_step(told)
    waiting, _ = asked.calls[-1]
    assert [request.due for request in waiting] == [53.0, 50.0, 46.0]


def test_the_policy_is_asked_again_only_when_something_has_changed(asked):
    told = beside(asked)
    assert [asked.in_step(told) for _ in range(3)] == [0, 0, 0]  # what runs grows as was predicted
    asked.answer = ["b"]
    told.tell(close("a"))
    assert only(told.later(), AdmitRequest) == [AdmitRequest("d:b:1:p1:2", 5)]


def test_the_policy_is_asked_again_when_there_is_more_memory(asked):
    told = beside(asked)
    told.tell(offer("c", prompt=8, offer=3))
    told.step()
    assert asked.in_step(told) == 0
    told.tell(close("c"))
    assert [asked.in_step(told), asked.in_step(told)] == [1, 0]


def test_a_full_batch_asks_nobody(asked):
    asked.answer = ["a"]
    told = begin(rules=Rules(admit="asked"), capacity=capacity(blocks=60, context=200, max_batch=1))
    told.running("a", max_tokens=LONG)
    told.land("b", number=2, max_tokens=LONG)
    assert asked.in_step(told) == 0
