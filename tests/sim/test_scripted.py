"""The engine whose requests write recorded texts: where they end, and what is reported of their hidden states when."""

import pytest

from tetri.cost import Cost
from tetri.engine_request import EngineRequest
from tetri.request import Capacity, LengthDistribution, Sampling
from tetri.sim.scripted import Scripted
from tetri.sim.texts import RecordedText

CAPACITY = Capacity(blocks=400, block_tokens=4, chunk_tokens=64, max_batch=8, context=1200)


def distribution(place):
    return LengthDistribution(100, (1.0 - place / 1000, place / 1000))


STATES = tuple((known, distribution(known)) for known in (0, 64, 128))
STOPS = RecordedText(10, 200, 300, follows=STATES)
CUT_OFF = RecordedText(10, 300, 300)
TEXTS = (STOPS, CUT_OFF, RecordedText(10, 1, 300, follows=STATES[:1]))


def engine(estimates_lengths=True):
    def text_of(sampling):
        return None if sampling.seed is None else TEXTS[sampling.seed]

    return Scripted(CAPACITY, Cost(), text_of, estimates_lengths=estimates_lengths)


def engine_request(phase, seed, key="x", outputs=0, most=300):
    return EngineRequest(key, phase, (1,) * (10 + outputs), 10, Sampling(max_tokens=most, seed=seed))


def steps(paged, most=1, until=400):
    """Of every step with tokens of a leg: (tokens, reason, foretold)."""
    for _ in range(until):
        plan = paged.plan(most)
        done = paged.run(plan, plan.steps)
        if done.allocated:
            paged.admit(done.allocated[0], 1)
        if done.tokens:
            yield len(done.tokens[0].ids), done.tokens[0].ids[-1], done.tokens[0].reason, done.estimates
        if not paged.slots:
            break


def decoded(paged, seed, most=1, outputs=0):
    paged.add(engine_request("decode", seed, outputs=outputs))
    made = list(steps(paged, most))
    paged.check()
    return made


def test_a_text_stops_where_it_ended_and_by_the_limit_where_that_cut_it_off():
    stopped, cut_off = decoded(engine(), 0), decoded(engine(), 1)
    assert len(stopped) == 199 and stopped[-1][1:3] == (0, "stop")  # the first token came with the prefill
    assert len(cut_off) == 299 and cut_off[-1][1:3] == (1, "length")
    assert all(token == 1 and reason is None for _, token, reason, _ in stopped[:-1])


def test_many_passes_in_one_go_end_at_the_same_token():
    made = decoded(engine(), 0, most=64)
    assert sum(count for count, *_ in made) == 199 and made[-1][1:3] == (0, "stop")


def test_who_has_no_text_writes_all_that_it_may():
    made = decoded(engine(), None)
    assert len(made) == 299 and made[-1][2] == "length" and not any(reported for *_, reported in made)


def test_a_leg_that_goes_on_ends_at_the_same_token():
    assert len(decoded(engine(), 0, outputs=150)) == 200 - 151


def test_the_state_of_a_decode_is_reported_after_the_pass_that_computes_it():
    """The pass that computes the 64th token's state gives the 65th."""
    reported = [(place + 2, *estimates) for place, (*_, estimates) in enumerate(decoded(engine(), 0)) if estimates]
    assert [(place, one.key, one.outputs) for place, one in reported] == [(65, "x", 64), (129, "x", 128)]
    assert reported[0][1].distribution == distribution(64)


def test_of_many_passes_the_last_state_is_told():
    reported = [one.outputs for *_, estimates in decoded(engine(), 0, most=1000) for one in estimates]
    assert reported == [128]
    paged = engine()
    paged.add(engine_request("decode", 0))
    made = steps(paged, 100)
    assert [[one.outputs for one in estimates] for *_, estimates in made] == [[64], [128]]


def test_a_leg_that_begins_later_is_told_of_what_comes_then():
    reported = [one.outputs for *_, estimates in decoded(engine(), 0, outputs=100) for one in estimates]
    assert reported == [128]


@pytest.mark.parametrize(("seed", "reason"), [(0, None), (2, "stop")])
def test_a_prompts_state_is_told_with_its_first_token(seed, reason):
    paged = engine()
    paged.add(engine_request("prefill", seed))
    ((_, _, ended, reported),) = steps(paged)
    assert ended == reason and [(one.outputs, one.distribution) for one in reported] == [(0, distribution(0))]


def test_of_a_prompt_that_starts_over_only_what_is_recorded_is_told():
    for outputs, known in ((64, [64]), (65, [])):
        paged = engine()
        paged.add(engine_request("prefill", 0, outputs=outputs))
        ((*_, reported),) = steps(paged)
        assert [one.outputs for one in reported] == known


def test_nothing_is_told_when_nobody_looks_at_hidden_states():
    assert not any(reported for *_, reported in decoded(engine(estimates_lengths=False), 0))


def test_a_leg_that_is_cancelled_is_forgotten():
    paged = engine()
    paged.add(engine_request("decode", 0))
    paged.cancel("x")
    assert not paged._scripts
    assert len(decoded(paged, 1)) == 299 and not paged._scripts
