import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tetri.wire.openai import ApiError, read_chat, read_completion, read_detokenize, read_tokenize
from tetri.wire.openai.bodies import NEUTRAL, ChatBody, CompletionBody, model_named, read, renamed

READERS = (read_chat, read_completion, read_tokenize, read_detokenize)


def refused(body, kind=CompletionBody):
    with pytest.raises(ApiError) as found:
        read(body if isinstance(body, bytes) else json.dumps(body).encode(), kind)
    assert found.value.status == 400 and "\n" not in found.value.message
    return found.value.message, found.value.param


@pytest.mark.parametrize(
    ("body", "line"),
    [
        (b"", "the body is not valid JSON: input data was truncated"),
        (b"{", "the body is not valid JSON: input data was truncated"),
        (b'{"prompt": "a"} x', "the body is not valid JSON: trailing characters (byte 17)"),
        (b'{"prompt": "\xff"}', "the body is not valid JSON: 'utf-8' codec can't decode byte 0xff"),
        (b'{"prompt": "\\ud800"}', "the body is not valid JSON: "),
        (b'{"prompt": NaN}', "the body is not valid JSON: invalid character (byte 11)"),
        (b'{"temperature": 1e999}', "the body is not valid JSON: number out of range"),
        (b'{"n": ' + b"9" * 5000 + b"}", "the body is not valid JSON: integer value out of range"),
        (b"[" * 100_000, "the body is not valid JSON: too deeply nested"),
        (b"[1]", "the body must be a JSON object"),
        (b'"a"', "the body must be a JSON object"),
    ],
)
def test_what_is_no_json_object_is_refused(body, line):
    message, param = refused(body)
    assert message.startswith(line) and param is None


@pytest.mark.parametrize(
    ("kind", "body", "line", "param"),
    [
        (CompletionBody, {"max_tokens": "5"}, "max_tokens: expected int, got str", "max_tokens"),
        (CompletionBody, {"max_tokens": 1.5}, "max_tokens: expected int, got float", "max_tokens"),
        (CompletionBody, {"stream": 1}, "stream: expected bool, got int", "stream"),
        (CompletionBody, {"logprobs": True}, "logprobs: expected int, got bool", "logprobs"),
        (CompletionBody, {"n": 0}, "n: expected int >= 1", "n"),
        (CompletionBody, {"stop": ["a", 1]}, "stop[1]: expected str, got int", "stop[1]"),
        (CompletionBody, {"logit_bias": {"x": 1}}, "logit_bias: in a key, expected int, got str", "logit_bias"),
        (CompletionBody, {"logit_bias": {"1": []}}, "logit_bias: expected float, got array", "logit_bias"),
        (CompletionBody, {"prompt": None}, "prompt: missing", "prompt"),
        (ChatBody, {}, "messages: missing", "messages"),
        (ChatBody, {"messages": [{"content": ""}]}, "messages[0].role: missing", "messages[0].role"),
        (ChatBody, {"messages": ["a"]}, "messages[0]: expected object, got str", "messages[0]"),
    ],
)
def test_a_wrong_type_names_the_field(kind, body, line, param):
    bare = {"prompt": "a"} if kind is CompletionBody else {}
    assert refused({**bare, **body}, kind) == (line, param)


def test_nulls_and_whole_numbers_with_a_fraction_are_as_they_are_meant():
    body = {"prompt": "a", "temperature": 1, "max_tokens": 16.0, "n": None, "stop": None, "stream_options": None}
    fields, ignored = read(json.dumps(body).encode(), CompletionBody)
    assert (fields.temperature, fields.max_tokens, fields.n, fields.stop) == (1.0, 16, 1, []) and ignored == ()


def test_unknown_fields_are_ignored_in_order():
    body = {"prompt": "a", "zzz": 1, "audio": {}, "user": "b", "store": None, "suffix": ""}
    assert read(json.dumps(body).encode(), CompletionBody)[1] == ("audio", "user", "zzz")


def test_the_advice_names_the_values_that_are_accepted():
    body = {"messages": [], "function_call": {"name": "f"}}
    assert refused(body, ChatBody)[0] == ('function_call is not supported: leave it out, or send "none" or "auto"')
    assert refused({"prompt": "a", "guided_json": {}})[0] == "guided_json is not supported: leave it out"
    several = {name: {} for name in ("vllm_xargs", "guided_regex", "echo", "best_of", "suffix", "guided_json")}
    assert refused({"prompt": "a", **several})[1] == "guided_regex", "the first one, whatever the order of sets"
    line = 'tools is not supported: leave it out, or send "none" as tool_choice'
    assert refused({"tools": [{}]}, ChatBody) == (line, "tools")


def test_a_model_has_all_its_names():
    assert model_named("", ["a", "b"]) == "a" and model_named("b", ["a", "b"]) == "b"
    with pytest.raises(ApiError, match=re.escape("the model 'c' does not exist: a, b does")) as found:
        model_named("c", ["a", "b"])
    assert (found.value.status, found.value.param) == (404, "model")


def test_only_whole_names_are_renamed():
    assert renamed("min_tokens above max_tokens", {"max_tokens": "most", "tokens": "x"}) == "min_tokens above most"


NAMES = sorted({*CompletionBody.__struct_fields__, *ChatBody.__struct_fields__, *NEUTRAL[ChatBody], "tokens", "user"})
NUMBERS = (
    st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([10**310, -(1 << 64), 1e308])
)
LEAVES = st.none() | st.booleans() | NUMBERS | st.text(max_size=5)
KEYS = st.sampled_from(["role", "content", "type", "text", "1", "include_usage"])
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=5
)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3), st.booleans())
def test_any_body_is_read_or_refused_by_a_line(body, complete):
    """Nothing but an ApiError comes out, so no body can be answered with status 500."""
    if complete:
        body = {"prompt": "a", "messages": [{"role": "user", "content": "a"}], **body}
    for reader in READERS:
        try:
            reader(json.dumps(body).encode(), ["m"])
        except ApiError as error:
            assert 400 <= error.status < 500 and "\n" not in error.message and json.loads(error.body())
