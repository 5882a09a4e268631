import json

import pytest

from tetri.request import AskedSampling
from tetri.wire.openai import ApiError, read_chat, read_completion
from tetri.wire.openai.completions import CHAT_TOKENS, MAX_CHOICES


def completion(**body):
    return read_completion(json.dumps({"prompt": "a", **body}).encode(), ["m"])


def chat(**body):
    return read_chat(json.dumps({"messages": [{"role": "user", "content": "a"}], **body}).encode(), ["m"])


def test_the_defaults_are_those_of_vllm():
    asked = completion()
    assert asked.sampling == AskedSampling(temperature=1.0) and (asked.n, asked.default_tokens) == (1, 16)
    assert (asked.model, asked.stream, asked.chat) == ("m", False, False)
    asked = chat()
    assert asked.sampling == AskedSampling(temperature=1.0) and asked.default_tokens == CHAT_TOKENS and asked.chat


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a b", ["a b"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1, 2], [3]], [[1, 2], [3]])],
)
def test_a_prompt_is_a_text_or_tokens_or_a_list_of_either(prompt, prompts):
    assert completion(prompt=prompt).prompts == prompts


@pytest.mark.parametrize(
    ("prompt", "line"),
    [
        ("", "prompt: a prompt needs at least one token"),
        ([], "prompt: a prompt needs at least one token"),
        (["a", ""], "prompt: a prompt needs at least one token"),
        ([[1], []], "prompt: a prompt needs at least one token"),
        (["a", 1], r"prompt\[1\]: expected str, got int"),
        ([1, "a"], r"prompt\[1\]: expected int, got str"),
        ([[1], [-2]], r"prompt\[1\]\[0\]: expected int >= 0"),
        ([1 << 32], r"prompt\[0\]: expected int <= 4294967295"),
        ([True], r"prompt\[0\]: expected int, got bool"),
        (5, "prompt: expected str | array, got int"),
        (["a"] * (MAX_CHOICES + 1), "prompt: at most 1024 prompts x n, got 1025 x 1"),
        ([[-1]] * (MAX_CHOICES + 1), "prompt: at most 1024 prompts x n, got 1025 x 1"),
    ],
)
def test_other_prompts_are_refused(prompt, line):
    with pytest.raises(ApiError, match=line) as refused:
        completion(prompt=prompt)
    assert refused.value.status == 400 and refused.value.param.startswith("prompt")


def test_one_request_cannot_take_all_choices_of_the_broker():
    assert len(completion(prompt=["a"] * 64, n=16).prompts) == 64
    with pytest.raises(ApiError, match="at most 1024 prompts x n, got 65 x 16"):
        completion(prompt=["a"] * 65, n=16)


@pytest.mark.parametrize(
    ("body", "field", "value"),
    [
        ({"temperature": 1e-6}, "temperature", 0.0),
        ({"temperature": 1e-4}, "temperature", 1e-4),
        ({"top_k": -1}, "top_k", 0),
        ({"seed": -1}, "seed", None),
        ({"seed": -2}, "seed", (1 << 63) - 2),
        ({"stop": "x"}, "stop", ["x"]),
        ({"logit_bias": {"5": -1}}, "logit_bias", {5: -1.0}),
        ({"max_tokens": 3}, "max_tokens", None),
    ],
)
def test_values_as_the_broker_knows_them(body, field, value):
    assert getattr(completion(**body).sampling, field) == getattr(chat(**body).sampling, field) == value


def test_log_probabilities():
    assert completion(logprobs=0).sampling.logprobs == 0 and chat(logprobs=False).sampling.logprobs is None
    assert chat(logprobs=True).sampling.logprobs == 0 and chat(logprobs=True, top_logprobs=3).sampling.logprobs == 3


def test_a_limit_is_what_is_written_if_it_fits():
    """As in vLLM: a prompt that leaves less is served. The broker does so with a limit that is only a default."""
    assert completion(max_tokens=5).default_tokens == chat(max_tokens=5).default_tokens == 5
    assert chat(max_tokens=5, max_completion_tokens=7).default_tokens == 7


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_a_limit_is_at_most_the_context(field):
    def read(limit):
        return read_chat(
            json.dumps({"messages": [{"role": "user", "content": "a"}], field: limit}).encode(), ["m"], 512
        )

    assert read(512).default_tokens == 512 and read(None).default_tokens == CHAT_TOKENS
    with pytest.raises(ApiError, match=f"^{field} must be at most 512, the context of the model") as refused:
        read(513)
    assert (refused.value.status, refused.value.param) == (400, field)


@pytest.mark.parametrize(
    ("read", "body", "param", "line"),
    [
        (completion, {"temperature": 101}, "temperature", "temperature must be from 0 to 100, got 101"),
        (completion, {"temperature": -1e-6}, "temperature", "temperature must be at least 0"),
        (completion, {"max_tokens": 0}, "max_tokens", "max_tokens must be at least 1, got 0"),
        (completion, {"min_tokens": 17}, "min_tokens", r"min_tokens \(17\) must not exceed max_tokens \(16"),
        (completion, {"stop": ""}, "stop", "stop takes at most 16 texts of 1 to 256 characters"),
        (completion, {"logprobs": 21}, "logprobs", "logprobs must be from 0 to 20, got 21"),
        (completion, {"logit_bias": {"1": 101}}, "logit_bias", "a logit_bias must be from -100 to 100"),
        (completion, {"stop_token_ids": [1] * 1025}, "stop_token_ids", "stop_token_ids takes at most 1024 token ids"),
        (completion, {"n": 2, "temperature": 0}, "n", "n must be 1 when temperature is 0, got 2"),
        (completion, {"n": 17}, "n", "n must be at most 16, got 17"),
        (completion, {"stream_options": {"include_usage": True}}, "stream_options", "send stream true too"),
        (chat, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "^top_logprobs must be from 0 to 20, got 21"),
        (chat, {"top_logprobs": 2}, "top_logprobs", "send logprobs true too"),
        (chat, {"min_tokens": 7, "max_completion_tokens": 6}, "min_tokens", r"not exceed max_completion_tokens \(6\)"),
        (chat, {"max_completion_tokens": 0}, "max_completion_tokens", "^max_completion_tokens must be at least 1"),
    ],
)
def test_what_the_broker_would_refuse_is_refused_by_the_name_of_the_field(read, body, param, line):
    with pytest.raises(ApiError, match=line) as refused:
        read(**body)
    assert (refused.value.status, refused.value.param) == (400, param)


def test_a_conversation_may_write_as_much_as_there_is_room():
    assert chat(min_tokens=100_000).sampling.min_tokens == 100_000


@pytest.mark.parametrize(
    ("options", "usage", "running"),
    [
        ({}, False, False),
        ({"include_usage": None}, False, False),
        ({"include_usage": True}, True, False),
        ({"include_usage": True, "continuous_usage_stats": True}, True, True),
        ({"continuous_usage_stats": True}, False, False),
    ],
)
def test_what_a_stream_counts(options, usage, running):
    asked = chat(stream=True, stream_options=options)
    assert (asked.usage, asked.running_usage) == (usage, running)


def test_another_model_is_unknown():
    with pytest.raises(ApiError, match="the model 'x' does not exist") as refused:
        chat(model="x")
    assert refused.value.status == 404
