"""The choices of a request: one prefill draws all their first tokens, and then each is a request of its own. Each gets
what a single request with its seed gets."""

from __future__ import annotations

import pytest
from handover import BLOCK, Group, Request, carry_alone, engine_request, fill
from msgspec.structs import replace
from plain import GAP

from tetri.engine.base import EngineError
from tetri.engine_request import INVALID, Sampled
from tetri.request import Sampling, blocks_for

pytestmark = [pytest.mark.model, pytest.mark.timeout(400)]

DRAWN = Sampling(max_tokens=12, temperature=1.0, seed=42, ignore_eos=True)


def choices(key: str, prompt: list[int], sampling: Sampling, count: int = 4) -> list[Request]:
    return [Request(f"{key}-{number}", prompt, sampling.for_choice(number)) for number in range(count)]


def a_prompt(prompts, length: int) -> list[int]:
    return next(prompt for prompt in prompts if len(prompt) >= length)[:length]


FILTERED = DRAWN.changed(top_p=0.9, repetition_penalty=1.2, logit_bias={28: 3.0})


@pytest.mark.parametrize(("length", "sampling"), [(636, DRAWN), (252, FILTERED)])
def test_each_choice_equals_a_single_request_with_its_seed(float32, prompts, length, sampling):
    """The longer prompt is of two chunks. Two blocks are left when all choices want one more: some are preempted."""
    prompt = a_prompt(prompts, length)
    group = choices("group", prompt, sampling)
    ballast = fill(float32.decode, leave=len(group) * blocks_for(length, BLOCK) + 2)
    Group(float32.prefill, float32.decode).carry(*group)
    for key in ballast:
        float32.decode.cancel(key)
    assert sum(choice.preempted for choice in group) >= 1
    for choice in group:
        assert choice.ids == float32.reference.generate(prompt, choice.sampling).ids, choice.key
        assert choice.recomputed == (len(prompt) if choice.preempted else 0)
    assert len({tuple(choice.ids) for choice in group}) == len(group)
    for engine in (float32.prefill, float32.decode):
        assert engine.free_blocks() == engine.facts()[1].blocks


def test_each_choice_has_its_own_log_probabilities(float32, prompts):
    prompt, sampling = a_prompt(prompts, 129), DRAWN.changed(logprobs=3, max_tokens=4, repetition_penalty=1.5)
    group = choices("likely", prompt, sampling)
    Group(float32.prefill, float32.decode).carry(*group)
    assert len({choice.output[0].logprob for choice in group}) > 1
    for choice in group:
        alone = carry_alone(float32, f"{choice.key}-alone", prompt, choice.sampling)
        assert choice.ids == alone.ids
        for token, other in zip(choice.output, alone.output, strict=True):
            assert token.logprob == pytest.approx(other.logprob, abs=GAP)
            assert token.top == pytest.approx(other.top, abs=GAP)


def test_a_choice_ends_with_its_first_token_and_the_others_go_on(float32, prompts):
    """The first choice among those that end."""
    prompt, drawn = a_prompt(prompts, 129), DRAWN.changed(max_tokens=4)
    firsts = [float32.reference.generate(prompt, choice.sampling).ids[0] for choice in choices("", prompt, drawn)]
    ends = [first == firsts[0] for first in firsts]
    assert not all(ends)
    group = choices("ends", prompt, drawn.changed(stop_token_ids=[firsts[0]]))
    Group(float32.prefill, float32.decode).carry(*group)
    assert [choice.ids[0] for choice in group] == firsts
    assert [len(choice.ids) == 1 for choice in group] == ends
    assert {choice.reason for choice, ended in zip(group, ends, strict=True) if ended} == {"stop"}


def test_all_choices_end_with_the_only_token_asked_for(engine, prompts):
    lead = engine_request("lead", "prefill", a_prompt(prompts, 40), DRAWN.changed(max_tokens=1))
    engine.add(replace(lead, siblings=(("one", 43), ("two", 44))))
    found = engine.step().tokens
    assert [(sampled.key, sampled.reason) for sampled in found] == [(key, "length") for key in ("lead", "one", "two")]


def test_nan_ends_the_whole_group(engine, prompts):
    """What a block held before is read too: NaN there spoils a prompt that does not fill it."""
    lead = engine_request("lead", "prefill", a_prompt(prompts, 40), DRAWN)
    engine.fill_next(2, 0xFF)
    engine.add(replace(lead, siblings=(("one", 43), ("two", 44))))
    assert engine.step().tokens == tuple(Sampled(key, (), "error", INVALID) for key in ("lead", "one", "two"))
    engine.fill_next(2, 0)


def test_only_a_prefill_request_has_siblings(engine):
    with pytest.raises(EngineError, match="only a prefill request can have siblings"):
        engine.add(replace(engine_request("lead", "decode"), siblings=(("one", 43),)))
