"""The cost table that the broker predicts with, and how it tells instances of different speed apart."""

from __future__ import annotations

from typing import Any

import pytest

from tests.core.broker.serving import Serving, assigned, serving, submit
from tests.core.build import PHASES, heartbeat, ready
from tests.core.reading import sent
from tetri.cost import Cost
from tetri.request import StepRatio
from tetri.wire.events import PeerUp
from tetri.wire.messages import Assign, CostTable

TABLE = CostTable(prefill=[[0.0, 0.0], [100.0, 10.0]], decode=[[1.0, 0.1]])  # 0.1 s a token
SLOW = CostTable(prefill=[[0.0, 0.0], [100.0, 40.0]], decode=[[1.0, 0.2]])
COST = Cost(prefill=((0.0, 0.0), (100.0, 10.0)), decode=((1.0, 0.1),))


def joins(told: Serving, iid: str, table: CostTable | None, incarnation: int = 1) -> None:
    told.tell(ready(iid, PHASES[iid[0]], incarnation).changed(cost=table), PeerUp(iid))


def compares(told: Serving, **ratios: StepRatio) -> None:
    """What workers find, until the broker has looked at it."""
    told.tell(*(heartbeat(iid, role=PHASES[iid[0]], step_ratio=ratio) for iid, ratio in ratios.items()))
    told.later(0.2)


def limits(told: Serving) -> tuple[float | None, float | None]:
    """Those of a request of ten tokens that names none."""
    (assign,) = sent(told.tell(submit("limited", (1,) * 10)), kind=Assign)
    return assign.slo.ttft_s, assign.slo.tpot_s


def placed(told: Serving, *sizes: int) -> list[str]:
    """Where prompts of so many tokens go, one after the other."""
    return [assigned(told.tell(submit(f"{place}", (1,) * size)))[0][0] for place, size in enumerate(sizes)]


def test_without_a_table_prompts_are_compared_by_their_tokens_and_have_no_limits() -> None:
    told = serving("p1", "p2", "d1")
    assert not told.core.costs.known and limits(told) == (None, None)
    assert placed(told, 4, 8, 1) == ["p2", "p2", "p1"]


def test_the_first_table_that_a_worker_announces_is_used_and_a_configured_one_stays() -> None:
    told = serving("d1")
    for iid, table in (("p1", None), ("p2", TABLE), ("p3", SLOW)):
        joins(told, iid, table)
    assert told.core.costs.known and limits(told) == (pytest.approx(6 * 1.0), pytest.approx(3 * 0.1))
    told = serving("d1", cost=COST)
    joins(told, "p1", SLOW)
    assert limits(told) == (pytest.approx(6 * 1.0), pytest.approx(3 * 0.1))


@pytest.mark.parametrize(
    "wrong",
    [{"prefill": []}, {"prefill": [[1.0, 2.0, 3.0]]}, {"decode": [[1.0, 2.0], [2.0, 1.0]]}, {"prefill_start_s": -1.0}],
)
def test_what_is_no_table_does_not_count(wrong: dict[str, Any]) -> None:
    told = serving("d1")
    joins(told, "p1", TABLE.changed(**wrong))
    assert not told.core.costs.known and limits(told) == (None, None)


def test_an_instance_whose_steps_take_longer_gets_less_until_they_do_not() -> None:
    assert placed(serving("p1", "p2", "d1", cost=COST), 8, 10, 4, 6) == ["p1", "p2", "p1", "p2"]
    told = serving("p1", "p2", "d1", cost=COST)
    compares(told, p1=StepRatio(prefill=2.0), p2=StepRatio(prefill=1.0))
    assert placed(told, 8, 10, 4, 6) == ["p1", "p2", "p2", "p2"]  # 1.6 s against 1.0, 1.4, 2.0
    compares(told, p1=StepRatio(prefill=1.0))
    assert assigned(told.tell(submit("again")))[0][0] == "p1"


def test_an_instance_of_slower_hardware_gets_less_until_it_restarts_on_other() -> None:
    told = serving("d1")
    joins(told, "p1", TABLE)
    joins(told, "p2", SLOW)
    assert placed(told, 10, 4, 4, 4) == ["p1", "p2", "p1", "p1"]  # 1.0 s, then 1.4 against 1.6
    told = serving("d1")
    joins(told, "p1", TABLE)
    joins(told, "p2", SLOW)
    joins(told, "p2", TABLE, incarnation=2)
    assert placed(told, 10, 4, 4, 4) == ["p1", "p2", "p2", "p2"]


def test_limits_follow_the_instance_in_the_middle() -> None:
    told = serving("p1", "p2", "p3", "d1", cost=COST)
    compares(told, p1=StepRatio(prefill=9.0), p2=StepRatio(prefill=3.0), p3=StepRatio(prefill=0.5))
    compares(told, d1=StepRatio(decode=2.0))
    assert limits(told) == (pytest.approx(6 * 3.0), pytest.approx(3 * 0.2))
