import msgspec
import pytest
from msgspec.structs import astuple

from tetri.wire.openai.bodies import Message
from tetri.wire.openai.errors import ApiError
from tetri.wire.openai.turns import turns_of


def turns(*messages):
    return [astuple(turn) for turn in turns_of(msgspec.convert(messages, list[Message]))]


def message(role, content):
    return {"role": role, "content": content}


def test_system_messages_at_the_beginning_become_one():
    rest = [message("user", "c"), message("system", "d"), message("developer", "e")]
    found = turns(message("system", "a"), message("developer", "b"), *rest)
    assert found == [("system", "a\n\nb"), ("user", "c"), ("system", "d"), ("system", "e")]
    assert turns(message("system", "a")) == [("system", "a")]
    assert turns(message("system", "a"), message("system", "b")) == [("system", "a\n\nb")]


def test_parts_are_joined_by_lines():
    parts = ["a", {"text": "b"}, {"type": "input_text", "text": "c", "cache_control": {"type": "x"}}]
    assert turns(message("user", parts)) == [("user", "a\nb\nc")] and turns(message("user", [])) == [("user", "")]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ([{"type": "text"}], "messages[0].content[0].text: missing"),
        ([{"type": "refusal"}], "messages[0].content[0].type: 'refusal' is not supported: only text is"),
        (["a", {"type": "video_url"}], "messages[0].content[1].type: 'video_url' is not supported: only text is"),
    ],
)
def test_other_parts_are_refused(content, line):
    with pytest.raises(ApiError) as refused:
        turns(message("user", content))
    assert refused.value.message == line and refused.value.param == line.split(": ")[0]


def test_an_unknown_role_and_an_empty_conversation_are_refused():
    with pytest.raises(ApiError, match="'tool' is not supported: system, developer, user, assistant are"):
        turns(message("user", "a"), message("tool", "b"))
    with pytest.raises(ApiError, match="at least one message"):
        turns()
