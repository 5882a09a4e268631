import json

import pytest
from wire.openai.outputs import USAGE, likely, reply

from tetri.request import Usage
from tetri.wire.openai import Answer, ApiError

HEAD = {"id": "id-1", "created": 1700000000, "model": "m"}


def test_a_conversation():
    answer = reply(Answer)
    assert answer.delta(0, 0, (1, 2), "ab ") == answer.end(0, 0, "stop", USAGE, (5,), "!") == b""
    assert json.loads(answer.finish()) == {
        **HEAD,
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "ab !", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
    }


def test_choices_are_in_order_whichever_ends_first_and_each_prompt_counts_once():
    answer = reply(Answer, prompt=["x", "y"], n=2)
    for prompt, choice in ((1, 1), (0, 0), (1, 0), (0, 1)):
        answer.delta(prompt, choice, (1,), f"{prompt}{choice}")
    for prompt, choice in ((1, 0), (0, 1), (0, 0), (1, 1)):
        answer.end(prompt, choice, "length", Usage(prompt_tokens=10 + prompt, completion_tokens=3))
    body = json.loads(answer.finish())
    texts = [(each["index"], each["text"], each["finish_reason"]) for each in body["choices"]]
    assert texts == [(0, "00", "length"), (1, "01", "length"), (2, "10", "length"), (3, "11", "length")]
    assert body["object"] == "text_completion"
    assert body["usage"] == {"prompt_tokens": 21, "completion_tokens": 12, "total_tokens": 33}


def test_no_text_ends_within_a_character():
    answer = reply(Answer, prompt="x")
    answer.delta(0, 0, (1,), "a\ufffd")
    answer.end(0, 0, "length", USAGE, (1, 1), "b\ufffd\ufffd")
    assert json.loads(answer.finish())["choices"][0]["text"] == "a\ufffdb"


def test_log_probabilities_are_of_the_whole_output():
    answer = reply(Answer, prompt="x", logprobs=1)
    answer.delta(0, 0, (likely(1, -1.0, {}),), "a")
    answer.end(0, 0, "stop", USAGE, (likely(2, -2.0, {}),), "b ")
    assert json.loads(answer.finish())["choices"][0]["logprobs"] == {
        "text_offset": [0, 1],
        "token_logprobs": [-1.0, -2.0],
        "tokens": ["a", "b "],
        "top_logprobs": [{"a": -1.0}, {"b ": -2.0}],
    }


def test_the_ids_of_tokens():
    answer = reply(Answer, prompt=[[8, 9], [7]], n=2, return_token_ids=True)
    for prompt, choice, tokens in ((0, 0, (1, 2)), (0, 1, (3,)), (1, 0, (4,)), (1, 1, ())):
        answer.end(prompt, choice, "stop", USAGE, tokens)
    ids = [(each["prompt_token_ids"], each["token_ids"]) for each in json.loads(answer.finish())["choices"]]
    assert ids == [([8, 9], [1, 2]), ([8, 9], [3]), ([7], [4]), ([7], [])]
    scored = reply(Answer, prompt="x", return_token_ids=True, logprobs=0)
    scored.end(0, 0, "stop", USAGE, (likely(5, -1.0, {}),))
    assert json.loads(scored.finish())["choices"][0]["token_ids"] == [5]
    chat = reply(Answer, return_token_ids=True)
    chat.accepted(0, 2, [4, 4])
    chat.end(0, 0, "stop", USAGE, (1,), "a")
    body = json.loads(chat.finish())
    assert body["prompt_token_ids"] == [4, 4] and body["choices"][0]["token_ids"] == [1]


def test_an_error_is_the_whole_answer():
    answer = reply(Answer)
    with pytest.raises(ApiError) as failed:
        answer.end(0, 0, "deadline", USAGE)
    assert json.loads(answer.fail(failed.value))["error"]["code"] == 504


@pytest.mark.model  # imports the client, which comes with vLLM
def test_the_official_client_reads_the_answers():
    from openai.types import Completion, chat

    for kind, body in (
        (chat.ChatCompletion, {"logprobs": True, "top_logprobs": 1}),
        (Completion, {"prompt": "x", "logprobs": 1}),
    ):
        answer = reply(Answer, **body)
        answer.end(0, 0, "stop", USAGE, (likely(1, -1.0, {2: -0.5}),), "a")
        read = kind.model_validate_json(answer.finish(), strict=True)
        assert read.usage.total_tokens == 10 and read.choices[0].finish_reason == "stop"
