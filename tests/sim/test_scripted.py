"""The engine whose requests write recorded texts: where they end, and what is reported of their hidden states when."""

import pytest

from tetri.cost import Cost
from tetri.engine_request import EngineRequest
from tetri.instance import Capacity
from tetri.request import LengthDistribution, Sampling
from tetri.sim.scripted import Scripted
from tetri.sim.texts import RecordedText

CAPACITY = Capacity(blocks=400, block_tokens=4, chunk_tokens=64, max_batch=8, context=1200)


def distribution(place):
    return LengthDistribution(100, (1.0 - place / 1000, place / 1000))


STATES = tuple((known, distribution(known)) for known in (0, 64, 128))
TEXTS = {
    "stops": RecordedText(10, 200, 300, follows=STATES),
    "cut off": RecordedText(10, 300, 300),
    "one token": RecordedText(10, 1, 300, follows=STATES[:1]),
    "none": None,
}


def started(phase, text, outputs=0, estimates_lengths=True):
    engine = Scripted(CAPACITY, Cost(), lambda sampling: TEXTS[text], estimates_lengths=estimates_lengths)
    engine.add(EngineRequest("x", phase, (1,) * (10 + outputs), 10, Sampling(max_tokens=300)))
    return engine


def run(phase, text, most=1, outputs=0, estimates_lengths=True):
    """Of every step with tokens: the number of known outputs after it, its last token, reason and estimates."""
    engine = started(phase, text, outputs, estimates_lengths)
    known = outputs + (phase == "decode")  # the first token came with the prefill
    while engine.slots:
        plan = engine.plan(most)
        done = engine.run(plan, plan.steps)
        if done.allocated:
            engine.admit("x", 1)
        for sampled in done.tokens:
            known += len(sampled.ids)
            yield known, sampled.ids[-1], sampled.reason, done.estimates
    engine.check()
    assert not engine._scripts


@pytest.mark.parametrize("most", [1, 64])
@pytest.mark.parametrize(
    "text, outputs, end",
    [
        ("stops", 0, (200, 0, "stop")),
        ("stops", 150, (200, 0, "stop")),
        ("cut off", 0, (300, 1, "length")),
        ("none", 0, (300, 1, "length")),
    ],
)
def test_a_text_stops_where_it_ended_and_by_the_limit_where_that_cut_it_off(text, outputs, most, end):
    *before, last = run("decode", text, most, outputs)
    assert last[:3] == end
    assert all((token, reason) == (1, None) for _, token, reason, _ in before)


@pytest.mark.parametrize(
    "phase, text, most, outputs, right",
    [
        # The pass that computes the 64th token's state gives the 65th.
        ("decode", "stops", 1, 0, [(65, 64), (129, 128)]),
        ("decode", "stops", 100, 0, [(101, 64), (200, 128)]),
        ("decode", "stops", 1000, 0, [(200, 128)]),  # of many passes the last one
        ("decode", "stops", 1, 100, [(129, 128)]),
        ("decode", "none", 1, 0, []),
        ("prefill", "stops", 1, 0, [(1, 0)]),
        ("prefill", "one token", 1, 0, [(1, 0)]),
        ("prefill", "stops", 1, 64, [(65, 64)]),  # it starts over
        ("prefill", "stops", 1, 65, []),
    ],
)
def test_a_recorded_state_is_reported_after_the_pass_that_computes_it(phase, text, most, outputs, right):
    reported = [(known, one) for known, *_, estimates in run(phase, text, most, outputs) for one in estimates]
    assert [(known, one.outputs) for known, one in reported] == right
    assert all((one.key, one.distribution) == ("x", distribution(one.outputs)) for _, one in reported)
    assert not any(estimates for *_, estimates in run(phase, text, most, outputs, estimates_lengths=False))


@pytest.mark.parametrize("outputs, right", [(0, [("x", 0), ("d", 64), ("d", 128)]), (64, [("x", 64), ("d", 128)])])
def test_a_request_that_stays_has_one_text_and_the_states_of_one_that_moves(outputs, right):
    engine, known, reported = started("prefill", "stops", outputs), outputs, []
    engine.stay("x", "d")
    while engine.slots:
        plan = engine.plan()
        done = engine.run(plan, plan.steps)
        known += len(done.tokens)
        reported += [(one.key, one.outputs) for one in done.estimates]
        if "x" in {sampled.key for sampled in done.tokens}:
            engine.admit("d", 1)
    assert (known, done.tokens[0].reason, reported) == (200, "stop", right)
    engine = started("prefill", "one token")
    engine.stay("x", "d")
    assert engine.run(engine.plan(), 1).tokens[0].reason == "stop" and not engine.slots


def test_a_prompt_whose_first_token_is_its_last_ends_with_it():
    assert [reason for _, _, reason, _ in run("prefill", "one token")] == ["stop"]


def test_a_request_that_is_cancelled_is_forgotten():
    engine = started("decode", "stops")
    engine.cancel("x")
    assert not engine._scripts
