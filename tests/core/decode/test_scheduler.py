"""Requests of which all KV has landed: admitting, tokens, their end."""

import pytest

from tests.core.build import capacity, chunk, offer, resend
from tests.core.driver import working
from tests.core.reading import kinds, only, sent
from tetri.core.actions import AdmitRequest, Broken
from tetri.cost import Cost
from tetri.engine_request import Sampled, StepDone
from tetri.policy.rules import Rules
from tetri.wire.events import PeerUp
from tetri.wire.messages import Staged, Tokens

KEY = "d:r:1:p1:1"


def begin(**changes):
    return working("d1", "p1", "p2", **changes)


@pytest.fixture
def told():
    return begin()


def admitted(actions):
    return [action.key.split(":")[1] for action in only(actions, AdmitRequest)]


def free(told):
    return told.load().free_blocks


def test_one_request_from_admission_to_its_end(told):
    told.land(max_tokens=3)
    first = told.step()
    assert kinds(first) == ["AdmitRequest", "Staged > broker", "Step", "Tokens > broker"]
    assert only(first, AdmitRequest) == [AdmitRequest(KEY, 5)] and sent(first, kind=Staged)[0].stage == "decode"
    assert sent(first, kind=Tokens)[0].items[0].start == 1 and told.load().running == 1
    last = told.step()
    assert kinds(last) == ["Step", "Tokens > broker"]
    (item,) = sent(last, kind=Tokens)[0].items
    end = item.end
    assert (item.start, end.reason, end.receipt.adopted, end.receipt.recomputed) == (2, "length", 8, 0)
    assert (end.receipt.kv_bytes, end.receipt.chunks, end.receipt.prefill_instance) == (64, 1, "p1")
    assert free(told) == 10 and told.holds() == [("r", "done", 3)] and told.run() == [] and told.most is None


def overdrawn():
    """`a` runs and has outgrown the memory, `b` has landed meanwhile and waits."""
    told = begin(capacity=capacity(blocks=6, max_batch=8), reserve_share=1.0)
    told.running("a", prompt=6, max_tokens=15)
    told.tell(offer("b", prompt=7, offer=2))
    while free(told) >= 0:
        told.step()
    told.tell(chunk("b", 0, 0, 2, token=5, offer=2))
    assert free(told) == -1 and told.load().landed == 1
    return told


def test_nobody_is_admitted_while_memory_is_overdrawn():
    assert not admitted(overdrawn().step())


def test_if_all_that_run_are_preempted_the_oldest_that_waits_gives_its_memory():
    told = overdrawn()
    assert not admitted(told.step(preempted="a"))
    assert told.core.deadline() == float("-inf")  # there is a way out
    assert admitted(told.step(preempted="b")) == ["b"] and told.load().running == 2


def test_preemption_shows_in_the_receipt(told):
    told.running("r", max_tokens=4)
    told.step(preempted="r")
    told.tell(PeerUp("p2"))  # anything may have made room
    told.step()
    end = sent(told.step(), kind=Tokens)[0].items[0].end
    assert (end.receipt.preempted, end.receipt.recomputed) == (1, 8)


def test_tokens_are_sent_again(told):
    told.running("r")
    (again,) = sent(told.tell(resend("r", 0)))
    assert (again.items[0].start, again.items[0].ids, again.items[0].end) == (0, [5, 6], None)
    assert not told.tell(resend("r", 2), resend("r", 0, attempt=2))
    told.step(r="stop")
    (tokens,) = sent(told.tell(resend("r", 1)))
    assert (tokens.items[0].ids, tokens.items[0].end.reason) == ([6, 6], "stop")
    (end,) = sent(told.tell(resend("r", 3)))
    assert (end.items[0].ids, end.items[0].end.reason) == ([], "stop")


def test_a_token_of_one_that_was_not_admitted_must_not_go_on(told):
    told.tell(offer("r", prompt=8))
    told.later()
    with pytest.raises(Broken, match="was not admitted"):
        told.tell(StepDone(tokens=(Sampled(KEY, (5,), None),)))


def test_if_nothing_runs_the_oldest_goes_whatever_the_policy_says():
    """Of 10 blocks `x` has 7: `a`, which takes 3 and will write 20 tokens, would not be let in beside anybody."""
    told = begin(rules=Rules(admit="peak", admit_end="high"), reserve_share=1.0)
    told.tell(offer("x", prompt=24, src="p2"))
    told.land("a", prompt=8, max_tokens=30)
    assert admitted(told.step()) == ["a"]


@pytest.mark.parametrize(
    "limits, share",
    [
        ([], 1.0),
        ([None, None], 1.0),
        ([0.25, None, 1.0, 0.5], 0.6),  # the one in the middle
        ([0.1, 0.2], 0.0),
        ([0.1, 0.1, 9.0], 0.0),  # less than its decodes take
    ],
)
def test_the_share_of_its_time_that_decodes_leave_to_prompts(limits, share):
    told = begin(capacity=capacity(blocks=40), reserve_share=1.0, cost=Cost(decode=((1.0, 0.2),)))
    told.tell(*(offer(f"r{place}", 8, offer=place, tpot_s=limit_s) for place, limit_s in enumerate(limits, 1)))
    assert told.load().share == pytest.approx(share) and told.load().step_s == (0.2 if limits else 0.0)


def test_requests_that_have_ended_leave_all_time_to_prompts():
    told = begin(cost=Cost(decode=((1.0, 0.2),)))
    told.land(max_tokens=2, tpot_s=1e-9)
    assert told.load().share == 0.0
    told.step()
    assert told.holds() == [("r", "done", 2)] and told.load().share == 1.0
