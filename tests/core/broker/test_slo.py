"""The limits of latency that a request has, and what is left of them when it is assigned."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from tests.core.broker.serving import RID, refusal, serving, submit
from tests.core.broker.work import opcodes
from tests.core.build import ready, tokens
from tests.core.reading import sent
from tetri.core.actions import Action
from tetri.core.broker.slo import SEEN, Limiter
from tetri.cost import Cost
from tetri.request import Slo
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.messages import Assign

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
