import pytest
from wire.openai.outputs import TEXTS, likely

from tetri.wire.openai.logprobs import Logprobs, chat_logprobs, completion_logprobs

TOKENS = [likely(1, -0.5, {1: -0.5, 2: -1.5}), likely(2, float("-inf"), {1: -0.25})]


def of(shape, *batches, as_ids=False):
    logprobs = Logprobs(shape, TEXTS.__getitem__, as_ids)
    return [logprobs.of(tokens) for tokens in batches]


def test_completions_have_a_list_a_column():
    assert of(completion_logprobs, TOKENS, [likely(5, -1.0, {})], [], [likely(1, -2.0, {})]) == [
        {
            "text_offset": [0, 1],
            "token_logprobs": [-0.5, -9999.0],
            "tokens": ["a", "b "],
            "top_logprobs": [{"a": -0.5, "b ": -1.5}, {"b ": -9999.0, "a": -0.25}],
        },
        {"text_offset": [3], "token_logprobs": [-1.0], "tokens": ["<end>"], "top_logprobs": [{"<end>": -1.0}]},
        {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []},
        {"text_offset": [8], "token_logprobs": [-2.0], "tokens": ["a"], "top_logprobs": [{"a": -2.0}]},
    ]


def test_chat_has_an_object_a_token_and_as_many_likely_ones_as_asked_for():
    a, b = {"token": "a", "bytes": [97]}, {"token": "b ", "bytes": [98, 32]}
    assert of(chat_logprobs, TOKENS, [], [likely(1, -1.0, {})]) == [
        {
            "content": [
                {**a, "logprob": -0.5, "top_logprobs": [{**a, "logprob": -0.5}, {**b, "logprob": -1.5}]},
                {**b, "logprob": -9999.0, "top_logprobs": [{**b, "logprob": -9999.0}]},
            ]
        },
        {"content": []},
        {"content": [{**a, "logprob": -1.0, "top_logprobs": []}]},
    ]


@pytest.mark.parametrize("batches", [[[3, 4, 1]], [[3], [4], [1]]])
def test_a_character_of_several_tokens_is_the_text_of_the_last(batches):
    found = of(
        chat_logprobs, *([likely(token, -1.0, {4: -2.0, 1: -3.0, 2: -4.0}) for token in batch] for batch in batches)
    )
    tokens = [token for each in found for token in each["content"]]
    assert [(token["token"], token["bytes"]) for token in tokens] == [("", []), ("é", [0xC3, 0xA9]), ("a", [97])]
    # What could have stood there is read after the same tokens.
    assert [[top["token"] for top in token["top_logprobs"]] for token in tokens] == [
        ["", "", "a"],
        ["é", "a", "b "],
        ["a", "", "b "],
    ]


@pytest.mark.parametrize(
    ("tokens", "texts"),
    [
        ([b" \xf0\x9f", b"\x8c", b"\xb8"], ["", "", " 🌸"]),  # with what comes before it in its first token
        ([b"\xa9", b"\xc3", b"\xa9"], ["", "", "é"]),  # what begins no character adds nothing
        ([b"\xc3", b"a", b"\xa9"], ["", "a", ""]),
        ([b"\xc3", b"\xa9", b"\xc3", b"\xa8"], ["", "é", "", "è"]),
        (["é".encode(), "\ufffd".encode()], ["é", ""]),
    ],
)
def test_parts_of_characters(tokens, texts):
    logprobs = Logprobs(completion_logprobs, tokens.__getitem__, as_ids=False)
    assert logprobs.of([likely(index, -1.0, {}) for index in range(len(tokens))])["tokens"] == texts


def test_tokens_are_named_by_their_ids_where_asked():
    (found,) = of(completion_logprobs, TOKENS, as_ids=True)
    assert found["tokens"] == ["token_id:1", "token_id:2"] and found["text_offset"] == [0, 10]
    assert found["top_logprobs"][0] == {"token_id:1": -0.5, "token_id:2": -1.5}
    (found,) = of(chat_logprobs, TOKENS[:1], as_ids=True)
    (token,) = found["content"]
    assert (token["token"], token["bytes"]) == ("token_id:1", [97]) and token["top_logprobs"][1][
        "token"
    ] == "token_id:2"
