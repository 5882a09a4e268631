"""The limits of latency that a request has, what is left of them when it is assigned, and how they were kept."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from tests.core.broker.serving import RID, Serving, cancel, done, refusal, replies, serving, submit
from tests.core.broker.work import opcodes
from tests.core.build import capacity, ending, failed, ready, tokens
from tests.core.reading import sent
from tetri.core.actions import Action, FromClient
from tetri.core.broker.slo import SEEN, Limiter
from tetri.cost import Cost
from tetri.request import Slo, choice_id
from tetri.wire.clients import Explain, Observe
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.messages import Assign
from tetri.wire.observation import Timeline

# A token of prompt takes 10 ms, a decode step 100 ms and 1 ms for each token of context.
COST = Cost(prefill=((0.0, 0.0), (100.0, 1.0)), decode=((1.0, 0.1),), decode_context_s=0.001)
NO_COST = Cost()


def slo(ttft_s: float | None = None, tpot_s: float | None = None) -> Slo:
    return Slo(ttft_s=ttft_s, tpot_s=tpot_s)


@pytest.mark.parametrize(
    ("asked", "deployment", "cost", "found"),
    [
        (slo(2, 0.5), slo(3, 0.6), COST, slo(2, 0.5)),
        (slo(2), slo(3, 0.6), COST, slo(2, 0.6)),
        (slo(), slo(3, 0.6), COST, slo(3, 0.6)),
        (slo(), slo(), COST, slo(6 * 0.2, 3 * 0.12)),
        (slo(tpot_s=0.5), slo(), COST, slo(6 * 0.2, 0.5)),
        (slo(), slo(3), COST, slo(3, 3 * 0.12)),
        (slo(), slo(), NO_COST, slo()),
        (slo(2), slo(tpot_s=0.6), NO_COST, slo(2, 0.6)),
    ],
)
def test_a_requests_own_limits_come_first_then_the_deployments_then_those_of_the_hardware(
    asked: Slo, deployment: Slo, cost: Cost, found: Slo
) -> None:
    given = Limiter(deployment, cost, 100).of(asked, 20)
    assert (given.ttft_s, given.tpot_s) == pytest.approx((found.ttft_s, found.tpot_s), nan_ok=True)


def ttft_after(prompts: Iterable[int]) -> float | None:
    limiter, found = Limiter(slo(), COST, 100), slo()
    for prompt in prompts:
        found = limiter.of(slo(tpot_s=1), prompt)
    return found.ttft_s


@pytest.mark.parametrize(
    ("prompts", "long"),
    [
        ([10], 10),
        ([10, 1000], 1000),
        ([*range(1, 101)], 90),
        ([*range(100, 0, -1)], 90),
        ([1000, *[10] * 99], 10),
        ([10] * 80 + [1000] * 20, 1000),
        ([1000] * 100 + [10] * SEEN, 10),
    ],
)
def test_the_limit_to_the_first_token_is_that_of_the_usual_long_prompt_of_late(prompts: list[int], long: int) -> None:
    assert ttft_after(prompts) == pytest.approx(6 * long / 100)


def test_the_work_of_a_request_does_not_grow_with_their_number() -> None:
    limiter = Limiter(slo(), COST, 100)

    def work(requests: int) -> int:
        return opcodes(lambda: [limiter.of(slo(), prompt % 700 + 1) for prompt in range(requests)])

    work(SEEN)
    few = work(100)
    work(2000)
    assert work(100) < 1.1 * few


def assigns(actions: list[Action]) -> list[Slo]:
    return [message.slo for message in sent(actions, kind=Assign)]


def test_an_assign_has_what_is_left_of_the_limits_at_that_moment() -> None:
    broker = serving("d1", slo=slo(8, 0.5))
    assert not assigns(broker.tell(submit()))  # it waits for a prefill instance
    broker.now = 3.0
    assert assigns(broker.tell(ready("p1", "prefill"), PeerUp("p1"))) == [slo(5, 0.5)]


def test_the_limit_of_a_restarted_request_runs_on_and_may_have_passed() -> None:
    broker = serving("p1", "d1")
    assert assigns(broker.tell(submit(slo=slo(2, 0.5)))) == [slo(2, 0.5)]
    broker.tell(ready("p2", "prefill"), PeerUp("p2"))
    broker.now = 3.0
    assert assigns(broker.tell(PeerDown("p1"))) == [slo(-1, 0.5)]


def test_after_its_first_token_the_next_one_is_due_when_the_mean_reaches_the_limit() -> None:
    broker = serving("p1", "d1", "d2")
    broker.tell(submit(slo=slo(2, 0.5)))
    broker.now = 1.0
    broker.tell(tokens("p1", RID, 0, 7), tokens("d1", RID, 1, 8))
    broker.now = 1.25
    assert assigns(broker.tell(PeerDown("d1"))) == [slo(1 + 2 * 0.5 - 1.25, 0.5)]


@pytest.mark.parametrize("limits", [slo(0), slo(-1), slo(tpot_s=float("nan")), slo(tpot_s=1e9)])
def test_invalid_limits_are_refused(limits: Slo) -> None:
    assert "seconds, got" in refusal(serving("p1", "d1").tell(submit(slo=limits)))


# ---------------------------------------------------------------- how they were kept


def ended(broker: Serving, *events: Any) -> str:
    """The result of a request that ends with these events."""
    return done(broker.tell(*events)).slo_result


@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        (slo(), "met"),
        (slo(2, 1), "met"),
        (slo(1.9, 1), "ttft"),
        (slo(1.9), "ttft"),
        (slo(2, 0.9), "tpot"),
        (slo(tpot_s=0.9), "tpot"),
        (slo(1.9, 0.9), "both"),
    ],
)
def test_a_request_that_ends_by_itself_has_kept_its_limits_or_missed_some(limits: Slo, kept: str) -> None:
    broker = serving("p1", "d1")
    broker.tell(submit(slo=limits))
    broker.now = 2.0
    broker.tell(tokens("p1", RID, 0, 7), tokens("d1", RID, 1, 8))
    broker.now = 4.0
    found = done(broker.tell(*ending("d1", RID, 2, 9)))
    assert (found.slo, found.slo_result, found.ttft_s) == (limits, kept, 2.0)


def test_one_token_has_no_time_between_two() -> None:
    broker = serving("p1", "d1")
    broker.tell(submit(slo=slo(2, 1e-9)))
    broker.now = 1.0
    assert ended(broker, *ending("p1", RID, 0, 7)) == "met"


@pytest.mark.parametrize(
    ("now", "first", "kept"),
    [(1.0, [], ""), (3.0, [], "ttft"), (3.0, [tokens("p1", RID, 0, 7)], "ttft"), (1.0, [tokens("p1", RID, 0, 7)], "")],
)
def test_a_cancelled_request_counts_only_with_what_it_had_missed(now: float, first: list[Any], kept: str) -> None:
    broker = serving("p1", "d1")
    broker.tell(submit(slo=slo(2, 1)))
    broker.now = now
    broker.tell(*first)
    assert ended(broker, cancel()) == kept


@pytest.mark.parametrize("reason", ["error", "deadline"])
def test_a_request_that_the_deployment_did_not_serve_has_failed(reason: str) -> None:
    broker = serving("p1", "d1")
    broker.tell(submit(deadline_s=1.0))
    if reason == "error":
        assert ended(broker, failed("p1", RID, retry=False)) == "failed"
    else:
        assert done(broker.later(1.0)).slo_result == "failed"


def test_each_choice_is_counted_once_if_it_counts() -> None:
    large = {"capacity": capacity(max_batch=16, blocks=99)}
    broker = serving(("p1", large), ("d1", large))
    broker.tell(submit(n=3, slo=slo(2, 1)))
    broker.now = 1.0
    broker.tell(*ending("p1", RID, 0, 7))
    broker.now = 3.0
    broker.tell(*ending("p1", choice_id(RID, 1), 0, 7), failed("p1", choice_id(RID, 2), retry=False))
    broker.tell(submit("k2"), cancel("r2"))
    (found,) = replies(broker.tell(FromClient(b"o", Observe())), b"o")
    assert found.measures.counts["slo_requests"] == {"met": 1, "ttft": 1, "tpot": 0, "both": 0, "failed": 1}
    assert [each.slo_result for each in found.ended] == ["met", "ttft", "failed", ""]


def test_the_status_tells_the_limits_of_a_request_that_names_none_and_how_many_were_kept() -> None:
    broker = serving("p1", "d1", slo=slo(tpot_s=0.5), cost=COST, chunk_tokens=100)
    assert (broker.status().slo, broker.status().slo_requests["met"]) == (slo(tpot_s=0.5), 0)  # no prompt yet
    broker.tell(submit(prompt=range(20), slo=slo(9, 9)), *ending("p1", RID, 0, 7))
    found = broker.status()
    assert (found.slo.ttft_s, found.slo.tpot_s) == pytest.approx((6 * 0.2, 0.5))
    assert found.slo_requests == {"met": 1, "ttft": 0, "tpot": 0, "both": 0, "failed": 0}


def test_how_a_request_was_served_tells_its_limits_and_which_it_missed() -> None:
    broker = serving("p1", "d1", slo=slo(tpot_s=0.5))
    broker.tell(submit(slo=slo(0.5)))

    def explained() -> Timeline:
        (found,) = replies(broker.tell(FromClient(b"o", Explain(rid=RID))), b"o")
        assert isinstance(found, Timeline)
        return found

    assert (explained().slo, explained().slo_result) == (slo(0.5, 0.5), "")
    broker.now = 1.0
    broker.tell(*ending("p1", RID, 0, 7))
    assert (explained().slo, explained().slo_result) == (slo(0.5, 0.5), "ttft")
    broker.later(100.0)  # it is kept in little memory now
    assert (explained().slo, explained().slo_result) == (slo(0.5, 0.5), "ttft")
