"""The tokens and log probabilities of a request that is handed over are those of vLLM alone with vLLM's own sampler."""

from __future__ import annotations

import pytest
from handover import Request, carry_alone
from plain import GAP

from tetri.request import Sampling, TokenLogprob

pytestmark = [pytest.mark.model, pytest.mark.timeout(400)]

PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": 0.9}
SAMPLINGS = {
    "greedy": {"ignore_eos": True},
    "none of the likely": {"logprobs": 0},
    "penalties": {"ignore_eos": True, **PENALTIES},
    "no penalties at all": {"repetition_penalty": 0.8, "frequency_penalty": -0.5, "presence_penalty": -0.5},
    "bias": {"logit_bias": {100: 9.0, 101: 8.5, 260: -100.0, 28: 7.5}, **PENALTIES},
    "bias that forces": {"logit_bias": {2: 100.0}, "min_tokens": 3, "ignore_eos": True},
}


@pytest.mark.parametrize("name", SAMPLINGS)
def test_tokens_and_log_probabilities_are_those_of_vllm(float32, prompts, name):
    sampling = Sampling(**{"max_tokens": 10, "logprobs": 5, **SAMPLINGS[name]})
    for length in (2, 129, 640) if name == "greedy" else (2, 129):
        prompt = next(prompt for prompt in prompts if len(prompt) == length)
        compare(float32, f"{name}-{length}", prompt, sampling)


def test_a_stop_token_ends_it_also_where_the_end_of_sequence_is_ignored(float32, prompts):
    """Unless it comes before `min_tokens`."""
    prompt = next(prompt for prompt in prompts if len(prompt) == 129)
    sampling = Sampling(max_tokens=8, logprobs=1, ignore_eos=True, **PENALTIES)
    ids = float32.reference.generate(prompt, sampling).ids
    last = next(at for at in range(3, 8) if ids[at] not in ids[:at])
    stop = sampling.changed(stop_token_ids=[ids[last]])
    assert compare(float32, "stop", prompt, stop).ids == ids[: last + 1]
    first = stop.changed(stop_token_ids=[ids[0]])
    assert compare(float32, "first", prompt, first).reason == "stop"
    request = compare(float32, "later", prompt, first.changed(min_tokens=2))
    assert ids[0] not in request.ids[:2]


def compare(float32, key: str, prompt: list[int], sampling: Sampling) -> Request:
    request = carry_alone(float32, key, prompt, sampling)
    right, reason = float32.reference.by_vllm(prompt, sampling)
    assert (request.ids, request.reason) == ([token.id for token in right], reason)
    for token, other in zip(request.output, right, strict=True):
        assert near(token, other), f"{key}: {token}, not {other}"
        values = list(token.top.values())
        assert len(values) == sampling.logprobs and values == sorted(values, reverse=True)
    return request


def near(token: TokenLogprob, other: TokenLogprob) -> bool:
    """Tokens that are about as likely may be in another order, and the last of them others."""
    least = min(other.top.values(), default=0.0)
    sure = {at for at, value in other.top.items() if value > least + GAP}
    return (
        abs(token.logprob - other.logprob) < GAP
        and sure <= set(token.top)
        and all(value == pytest.approx(other.top.get(at, least), abs=GAP) for at, value in token.top.items())
    )
