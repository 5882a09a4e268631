import json
from functools import partial

import pytest
from msgspec.structs import astuple

from tetri.wire.openai import ApiError, detokenized, read_detokenize, read_tokenize, tokenized

MESSAGES = [{"role": "user", "content": "a"}]


def read(reader, **body):
    return reader(json.dumps(body).encode(), ["m"])


tokenize, detokenize = partial(read, read_tokenize), partial(read, read_detokenize)


def test_a_text_or_a_conversation_is_tokenized():
    assert astuple(tokenize(prompt="")) == ("", None, True, False)
    assert astuple(tokenize(prompt="a", add_special_tokens=False, return_token_strs=True)) == ("a", None, False, True)
    asked = tokenize(messages=MESSAGES, model="m", add_special_tokens=False, add_generation_prompt=True)
    assert asked.prompt is None and [astuple(turn) for turn in asked.turns] == [("user", "a")]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "messages": MESSAGES}, "prompt"),
        ({"messages": MESSAGES, "add_special_tokens": True}, "add_special_tokens"),
        ({"messages": MESSAGES, "add_generation_prompt": False}, "add_generation_prompt"),
        ({"prompt": "a", "model": "x"}, "model"),
    ],
)
def test_other_bodies_are_refused(body, param):
    with pytest.raises(ApiError) as refused:
        tokenize(**body)
    assert refused.value.param == param


def test_tokens_become_a_text():
    assert detokenize(tokens=[1, 2]) == [1, 2] and json.loads(detokenized("é")) == {"prompt": "é"}
    with pytest.raises(ApiError, match=r"tokens\[1\]: expected int, got str"):
        detokenize(tokens=[1, "a"])
    with pytest.raises(ApiError, match="the model 'x' does not exist"):
        detokenize(tokens=[], model="x")


def test_the_answer_counts_the_tokens():
    body = {"count": 2, "max_model_len": 512, "tokens": [1, 2], "token_strs": None}
    assert json.loads(tokenized([1, 2], 512)) == body
    assert json.loads(tokenized([1, 2], 512, ["a", "b"])) == {**body, "token_strs": ["a", "b"]}
