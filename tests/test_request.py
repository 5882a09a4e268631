"""What a request is."""

import msgspec
import pytest

from tetri.request import (
    AskedSampling,
    LengthRange,
    Sampling,
    Stage,
    TokenLogprob,
    blocks_for,
    choice_id,
    choices_problem,
    sampling_problem,
    token_ids,
)

NAN = float("nan")


def test_the_defaults_are_fine_and_so_are_the_bounds():
    assert sampling_problem(Sampling()) is None
    lowest = Sampling(
        max_tokens=1, temperature=0, top_p=1e-9, presence_penalty=-2, frequency_penalty=-2, repetition_penalty=1e-3
    )
    highest = Sampling(temperature=100, min_p=1, presence_penalty=2, seed=(1 << 63) - 1, stop=["x" * 256] * 16)
    assert sampling_problem(lowest) is None and sampling_problem(highest) is None


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"max_tokens": 1 << 31}, "max_tokens must be from 1 to"),
        ({"temperature": -0.1}, "temperature must be at least 0, got -0.1"),
        ({"temperature": NAN}, "temperature must be from 0 to 100, got nan"),
        ({"temperature": 101}, "temperature must be from 0 to 100, got 101"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"min_p": 1.1}, "min_p must be from 0 to 1"),
        ({"presence_penalty": -3}, "presence_penalty must be at least -2"),
        ({"frequency_penalty": 3}, "frequency_penalty must be from -2 to 2"),
        ({"repetition_penalty": 0}, "repetition_penalty must be at least 0.001"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1"),
        ({"top_p": NAN}, "top_p must be above 0 and at most 1"),
        ({"seed": -1}, "seed must be from 0"),
        ({"seed": 1 << 63}, "seed must be from 0"),
        ({"min_tokens": -1}, "min_tokens must be at least 0"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens (9) must not exceed max_tokens (8)"),
        ({"stop": [""]}, "stop takes at most 16 texts"),
        ({"stop": ["x" * 257]}, "stop takes at most 16 texts"),
        ({"stop": ["x"] * 17}, "stop takes at most 16 texts"),
        ({"logprobs": -1}, "logprobs must be from 0 to 20, got -1"),
        ({"logprobs": 21}, "logprobs must be from 0 to 20, got 21"),
        ({"logit_bias": {1: 101.0}}, "a logit_bias must be from -100 to 100"),
        ({"logit_bias": {1: NAN}}, "a logit_bias must be from -100 to 100"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(wrong, message):
    assert message in (sampling_problem(Sampling(**wrong)) or "")


def test_a_limit_that_was_not_asked_for_is_the_default_until_the_broker_knows_what_fits():
    asked = AskedSampling(seed=3, min_tokens=129)
    assert sampling_problem(asked) == "min_tokens (129) must not exceed max_tokens (128, the default)"
    assert asked.limited(9) == Sampling(max_tokens=9, seed=3, min_tokens=129)
    assert AskedSampling(max_tokens=0).limited(9).max_tokens == 0


@pytest.mark.parametrize(
    "n, temperature, message",
    [
        (1, 0, ""),
        (16, 0.5, ""),
        (17, 1, "n must be at most 16, got 17"),
        (2, 0, "n must be 1 when temperature is 0, got 2"),
    ],
)
def test_how_many_choices_a_request_may_have(n, temperature, message):
    found = choices_problem(n, AskedSampling(temperature=temperature))
    assert (found or "").startswith(message) and (found is None) == (message == "")


def test_the_seed_of_a_choice_is_that_of_a_request_of_its_own():
    sampling = Sampling(seed=(1 << 63) - 2, temperature=1)
    assert [sampling.for_choice(index).seed for index in range(3)] == [(1 << 63) - 2, (1 << 63) - 1, 0]
    assert Sampling().for_choice(3) == Sampling()
    assert [choice_id("r", index) for index in range(3)] == ["r", "r.1", "r.2"]


def test_a_token_is_its_id_or_a_record():
    assert token_ids([5, TokenLogprob(6, -0.5, {6: -0.5, 7: -1.0})]) == [5, 6]


def test_a_seed_is_set_without_touching_the_rest():
    assert Sampling(temperature=0.5).changed(seed=7) == Sampling(temperature=0.5, seed=7)


@pytest.mark.parametrize("tokens, blocks", [(0, 0), (1, 1), (4, 1), (5, 2)])
def test_blocks_hold_tokens(tokens, blocks):
    assert blocks_for(tokens, 4) == blocks


def test_three_stages_are_ends():
    assert [stage for stage in Stage if stage.ended] == [Stage.DONE, Stage.FAILED, Stage.CANCELLED]


@pytest.mark.parametrize("low, high", [(200, 200), (5, 3), (1, 0)])
def test_a_range_that_holds_no_length_is_none_and_no_message_has_one(low, high):
    with pytest.raises(ValueError, match=f"no length is at least {low} and less than {high}"):
        LengthRange(low=low, high=high)
    with pytest.raises(msgspec.ValidationError, match="no length is"):
        msgspec.msgpack.decode(msgspec.msgpack.encode({"low": low, "high": high or 1}), type=LengthRange)
