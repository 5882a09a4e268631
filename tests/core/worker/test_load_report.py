"""What a worker reports of its load."""

import pytest

from tests.core.build import assign, capacity, close
from tests.core.driver import working
from tests.core.reading import only, sent
from tetri.core.actions import BROKER, Publish
from tetri.core.worker import load_report
from tetri.cost import Cost
from tetri.request import LengthRange, StepRatio
from tetri.wire.events import PeerUp
from tetri.wire.messages import CostTable, Ready


def test_loads_are_published_again_and_again():
    cost = Cost(prefill=((0.0, 0.0), (10.0, 1.0)), decode=((1.0, 0.5),))
    roomy = capacity(blocks=40, context=100, max_batch=4)
    told = working("d1", capacity=roomy, slots=30, load_s=0.25, cost=cost)
    told.running("x", src="d9", max_tokens=20, length=LengthRange(low=0, high=10))
    told.tell(assign("a", prompt=20))
    told.later()
    told.now += 0.2
    told.step()
    (report,) = [action.message for action in only(told.later(0.05), Publish)]
    load = report.load
    assert (load.queued, load.queued_tokens, load.queued_s) == (1, 13, pytest.approx(1.3))
    assert (load.waiting, load.landed, load.running, load.heavy, load.growth_blocks) == (1, 0, 1, 0, 2 + 2)
    assert (load.decode_s, load.busy) == (pytest.approx(3.5), pytest.approx(0.8))  # 6 and 8 tokens
    assert only(told.later(0.25), Publish)


def test_a_long_queue_is_listed_in_every_few_heartbeats_a_short_one_in_each(monkeypatch):
    monkeypatch.setattr(load_report, "LISTED", 10)
    told = working("p1", capacity=capacity(max_batch=1))

    def listed(count):
        """How many requests each of so many heartbeats lists."""
        lists = [told.heartbeat().holds for _ in range(count)]
        return [None if holds is None else len(holds) for holds in lists]

    told.tell(*[assign(f"r{number}", prompt=4) for number in range(10)])
    assert listed(3) == [10] * 3
    told.tell(assign("one", prompt=4))
    assert listed(4) == [None, 11] * 2
    told.tell(*[assign(f"s{number}", prompt=4) for number in range(29)])
    assert listed(8) == [None, None, None, 40] * 2
    told.tell(*[close(f"s{number}") for number in range(29)], close("one"))
    assert listed(2) == [10] * 2


def test_a_worker_announces_its_table_if_it_has_one():
    """Also one whose numbers were whole, as numbers of the other kind: a replay compares them."""
    whole = Cost(prefill=((1, 2), (10, 3)), decode=((1, 0.5),), prefill_start_s=0.25, decode_context_s=0.125)
    made = CostTable(prefill=[[1, 2], [10, 3]], decode=[[1, 0.5]], prefill_start_s=0.25, decode_context_s=0.125)
    for changes, table in (({}, made), ({"compares_steps": False}, None)):
        (ready,) = sent(working("p1", cost=whole, **changes).tell(PeerUp(BROKER)), kind=Ready)
        assert ready.cost == table
        assert table is None or all(type(x) is float for pair in ready.cost.prefill for x in pair)


# ---------------------------------------------------------------- step times

STEPS = Cost(prefill=((1.0, 3.0), (4.0, 6.0)), decode=((1.0, 2.0),), prefill_start_s=0.5, decode_context_s=0.25)
ROOMY = {"capacity": capacity(blocks=90, context=300, chunk_tokens=4), "slots": 80, "cost": STEPS}


def decoding(**changes):
    """`x` is about to decode, with 9 tokens."""
    told = working("d1", **ROOMY, **changes)
    told.land("x", src="d9", max_tokens=200)
    return told


def ratios(told, steps):
    """What each heartbeat reports before and after a step that takes so many seconds."""
    found = []
    for seconds in steps:
        found.append(told.heartbeat().step_ratio)
        told.now += seconds
        told.step()
    return [*found, told.heartbeat().step_ratio]


def test_a_ratio_is_the_median_of_the_last_steps(monkeypatch):
    monkeypatch.setattr(load_report, "MOST", 5)
    factors = [9, 3, 4, 1000, 4, 5, 5, 1, 5]
    found = ratios(decoding(), [factor * (2 + 0.25 * size) for size, factor in enumerate(factors, start=9)])
    assert found[:3] == [StepRatio()] * 3 and {each.prefill for each in found} == {None}
    assert [each.decode for each in found[3:]] == pytest.approx([4, 9, 4, 4, 5, 5, 5])


def test_between_two_heartbeats_one_step_of_a_kind_is_compared():
    told = decoding(heartbeat_s=1000.0)
    ratios(told, [2 * (2 + 0.25 * size) for size in (9, 10, 11)])
    for _ in range(9):
        told.now += 50.0
        told.step()
    assert told.heartbeat().step_ratio.decode == pytest.approx(2.0)


def test_a_pass_that_only_allocates_blocks_is_not_that_one():
    told = working("d1", heartbeat_s=1000.0, **ROOMY)
    for number, rid in enumerate("xyz", start=1):
        told.heartbeat()
        told.land(rid, src="d9", number=number, max_tokens=200)
        told.later()
        told.now += 2 * (2 + 0.25 * 9)
        told.step()
        told.tell(close(rid))
    assert told.heartbeat().step_ratio == StepRatio(decode=pytest.approx(2.0))


def test_a_run_of_several_passes_is_compared_as_a_whole():
    told = decoding(stream_interval=4, heartbeat_s=1000.0, view_s=9000.0)
    for size in (9, 13, 17):
        told.heartbeat()
        told.now += 3 * sum(2 + 0.25 * (size + passed) for passed in range(4))
        told.step(passes=4)
    assert told.heartbeat().step_ratio == StepRatio(decode=pytest.approx(3.0))


@pytest.mark.parametrize(("context", "phase"), [(8, "prefill"), (80, "decode")])
def test_a_step_of_both_phases_counts_for_the_one_that_is_predicted_to_take_longer(context, phase):
    """Beside a decode there are chunks of 3 tokens. What a step costs at least, 2.0, is predicted once."""
    told = working("m1", **ROOMY)
    told.running("x", src="d9", prompt=context, max_tokens=200)
    told.tell(assign("a", prompt=13))
    steps = [(5 + 0.5 * 3 * 3 * turn) + (2 + 0.25 * (context + 2 + turn)) - 2 for turn in range(4)]
    assert ratios(told, [4 * seconds for seconds in steps])[-1] == StepRatio(**{phase: pytest.approx(4.0)})


def test_beside_decodes_whose_time_is_known_a_chunk_gets_the_rest_of_the_step():
    """Decodes take 3 times what the table says, chunks 5 times: of the 2.0 that a step costs at least, too."""
    told = decoding()
    assert ratios(told, [3 * (2 + 0.25 * size) for size in (9, 10, 11)])[-1].decode == pytest.approx(3.0)
    told.tell(assign("a", prompt=13))
    steps = [5 * (5 + 0.5 * 3 * 3 * turn) + 3 * 0.25 * (13 + turn) for turn in range(3)]
    assert ratios(told, [3 * (2 + 0.25 * 12), *steps])[-1] == StepRatio(
        prefill=pytest.approx(5.0), decode=pytest.approx(3.0)
    )


def test_predictions_are_corrected_by_the_ratios():
    told = working("m1", **ROOMY)
    told.running("x", src="d9", prompt=8, max_tokens=200)
    told.tell(assign("a", prompt=9), assign("b", prompt=13))
    ratios(told, [5 * (5 + 0.5 * 3 * 3 * turn + 0.25 * (10 + turn)) for turn in range(3)])
    told.step()
    load = told.heartbeat().load
    assert load.queued_s == pytest.approx(5 * STEPS.prompt_s(13, 13 - load.queued_tokens, 4)) and load.queued_s > 0


@pytest.mark.parametrize("changes", [{"compares_steps": False}, {"cost": Cost()}])
def test_with_nothing_to_compare_there_is_no_ratio(changes):
    told = working("d1", **{**ROOMY, **changes})
    told.land("x", src="d9", max_tokens=200)
    assert ratios(told, [1.0] * 9) == [StepRatio()] * 10
