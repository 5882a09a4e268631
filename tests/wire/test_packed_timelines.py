"""Timelines in little memory."""

import pytest

from tetri.request import Receipt, Slo, Stage, Usage
from tetri.wire.clients import Done
from tetri.wire.observation import StageSpan, StepSpan, TraceEvent
from tetri.wire.packed_timelines import Facts, Moved, pack, pack_step, timeline, unpacked

DONE = Done(
    rid="r1",
    reason="error",
    usage=Usage(prompt_tokens=8, completion_tokens=5),
    timeline={},
    ttft_s=1.5,
    jct_s=4.0,
    receipt=Receipt(prompt_tokens=8, attempts=2),
    error="oh no",
    choice=1,
    slo=Slo(ttft_s=1.0),
    slo_result="failed",
)
MOVES = [
    (0.25, Stage.QUEUED, "", 1),
    (0.25, Stage.QUEUED, "p1", 1),
    (1.0, Stage.PREFILL, "p1", 1),
    (1.5, Stage.QUEUED, "", 2),
    (1.5, Stage.QUEUED, "p2", 2),
    (2.5, Stage.DECODE, "d1", 2),
    (4.0, Stage.FAILED, "", 2),
]
ARRIVAL = 100.0
STEPS = [pack_step(StepSpan(ARRIVAL + 2.5 + at, 0.25, "d1", 1, 7, 16, 1)) for at in (0.0, 0.5)]


def facts(moves=MOVES, done=DONE, events=()):
    moved = [Moved(9, ARRIVAL + at, "r1.1", stage, iid, attempt, 0) for at, stage, iid, attempt in moves]
    asked = ("r1", 1, 2, ARRIVAL, ARRIVAL + 1.5, 0.5, 8, 5, moves[-1][3], moves[-1][1], done)
    return Facts(*asked, moved, list(events), 3, Slo(ttft_s=1.0))


def test_the_stages_follow_each_other_from_the_arrival_to_the_end():
    found = timeline(facts(), [], 0, ARRIVAL + 9)
    assert found.stages == [
        StageSpan(Stage.QUEUED, 1, "", 0.0, 0.25),  # its text was tokenized
        StageSpan(Stage.QUEUED, 1, "p1", 0.25, 0.75),
        StageSpan(Stage.PREFILL, 1, "p1", 1.0, 0.5),
        StageSpan(Stage.QUEUED, 2, "p2", 1.5, 1.0),
        StageSpan(Stage.DECODE, 2, "d1", 2.5, 1.5),
    ]
    assert (found.reason, found.error, found.jct_s, found.ttft_s, found.age_s) == ("error", "oh no", 4.0, 1.5, 9.0)
    assert (found.rid, found.choice, found.choices, found.attempts, found.stage) == ("r1", 1, 2, 2, Stage.FAILED)
    assert (found.prompt_tokens, found.outputs, found.receipt, found.left_out) == (8, 5, DONE.receipt, 3)
    assert (found.slo, found.slo_result) == (Slo(ttft_s=1.0), "failed")


def test_the_last_stage_of_an_open_choice_lasts_until_now():
    found = timeline(facts(MOVES[:-1], done=None), [], 0, ARRIVAL + 3)
    assert found.stages[-1] == StageSpan(Stage.DECODE, 2, "d1", 2.5, 0.5)
    assert (found.reason, found.jct_s, found.receipt, found.stage) == (None, None, None, Stage.DECODE)
    assert (found.slo, found.slo_result) == (Slo(ttft_s=1.0), "")


def test_events_are_on_one_clock_in_the_order_in_which_they_began():
    chunk = TraceEvent("chunk", "r1", 1, 5.0, seconds=0.5, last=8, size=8)
    retry = TraceEvent("retry", "r1.1", 2, ARRIVAL + 1.5, note="p1: silent")
    found = timeline(facts(events=[(0.0, "broker", retry), (ARRIVAL - 4.0, "p1", chunk)]), [], 0, ARRIVAL)
    assert found.events == [
        TraceEvent("chunk", "r1", 1, 1.0, "p1", seconds=0.5, last=8, size=8),
        TraceEvent("retry", "r1.1", 2, 1.5, "broker", note="p1: silent"),
    ]


@pytest.mark.parametrize("many", [0, 2, 70_000])
def test_what_is_packed_is_told_as_before(many):
    steps = [STEPS[index % 2] for index in range(many)]
    event = (ARRIVAL, "p1", TraceEvent("chunk", "r1", 1, 1.0))
    made = facts(events=[event])
    packed = pack(made, steps)
    assert packed.size == len(packed.facts) + sum(map(len, steps))
    found = unpacked(packed, ARRIVAL + 5)
    assert found == timeline(made, steps, many, ARRIVAL + 5)
    starts = [(span.start_s, span.tokens, span.batch, span.chunk_tokens) for span in found.steps]
    assert starts[:2] == [(2.5, 1, 7, 16), (3.0, 1, 7, 16)][:many] and len(starts) == many
