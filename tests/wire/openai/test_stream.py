import json
import re
from functools import partial

import pytest
from wire.openai.outputs import USAGE, likely, reply

from tetri.wire.openai import ApiError, Stream


def events(data):
    """The objects of server-sent events, whose ids count from where the first one begins; [DONE] as it is."""
    found = []
    assert not data or data.endswith(b"\n\n")
    for event in data.split(b"\n\n")[:-1]:
        *number, line = event.split(b"\n")
        assert line.startswith(b"data: ")
        value = line[6:].decode()
        found.append(value if value == "[DONE]" else (int(number[0].removeprefix(b"id: ")), json.loads(value)))
    return found


def chunk(kind, choices, **more):
    return {"id": "id-1", "object": kind, "created": 1700000000, "model": "m", "choices": choices, **more}


def test_a_conversation_begins_with_the_role_of_the_choice():
    stream, kind = reply(Stream, stream=True), "chat.completion.chunk"
    open_ = {"index": 0, "logprobs": None, "finish_reason": None}
    assert events(stream.delta(0, 0, (1,), 'a"é\n')) == [
        (1, chunk(kind, [{**open_, "delta": {"role": "assistant", "content": ""}}])),
        (2, chunk(kind, [{**open_, "delta": {"content": 'a"é\n'}}])),
    ]
    assert events(stream.delta(0, 0, (1,), 'a"é\n')) == [(3, chunk(kind, [{**open_, "delta": {"content": 'a"é\n'}}]))]
    end = {"index": 0, "delta": {"content": "c"}, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    assert events(stream.end(0, 0, "stop", USAGE, (1,), "c")) == [(4, chunk(kind, [end]))]
    assert stream.finish() == b"data: [DONE]\n\n"


def test_a_client_that_wants_no_ids_gets_lines_of_data_alone():
    """vLLM's benchmark takes all between two empty lines as data."""
    with_ids, without = (reply(partial(Stream, numbered=numbered), stream=True) for numbered in (True, False))
    made = [
        [stream.delta(0, 0, (1,), "a"), stream.delta(0, 0, (1,), "b"), stream.end(0, 0, "stop", USAGE, (1,), "c")]
        for stream in (with_ids, without)
    ]
    assert b"".join(made[1]).count(b"\n\ndata: ") == 3 and b"id: 4\n" in b"".join(made[0])
    assert re.sub(rb"(?m)^id: \d+\n", b"", b"".join(made[0])) == b"".join(made[1])
    assert without.fail(ApiError(500, "gone")).startswith(b"data: {")


def test_another_id_is_that_of_all_events():
    stream = reply(Stream, stream=True)
    stream.rename("id-2")
    found = events(stream.delta(0, 0, (1,), "a") + stream.delta(0, 0, (1,), "b") + stream.end(0, 0, "stop", USAGE))
    assert len(found) == 4 and {value["id"] for _, value in found} == {"id-2"}


def test_a_choice_that_ends_at_once_has_its_role_too():
    stream = reply(Stream, stream=True)
    (_, first), (_, last) = events(stream.end(0, 0, "stop", USAGE))
    assert first["choices"][0]["delta"]["role"] == "assistant" and last["choices"][0]["finish_reason"] == "stop"


def test_completions_have_texts_and_the_index_of_all_choices():
    stream = reply(Stream, stream=True, prompt=["x", "y"], n=2)
    for _ in range(2):  # the first event of a choice is made otherwise than the next ones
        for prompt, choice in ((1, 1), (0, 0), (1, 0), (0, 1)):
            ((_, found),) = events(stream.delta(prompt, choice, (1,), "z"))
            index = 2 * prompt + choice
            expected = {"index": index, "text": "z", "logprobs": None, "finish_reason": None}
            assert found == chunk("text_completion", [expected])


@pytest.mark.parametrize("body", [{}, {"prompt": "x"}, {"return_token_ids": True}])
def test_nothing_new_is_no_event_but_tokens_without_text_are(body):
    stream = reply(Stream, stream=True, **body)
    assert stream.delta(0, 0, (), "") == b""
    assert len(events(stream.delta(0, 0, (1,), ""))) >= 1 and len(events(stream.delta(0, 0, (1,), ""))) == 1
    assert stream.delta(0, 0, (), "") == b""


@pytest.mark.parametrize("body", [{}, {"prompt": "x"}, {"prompt": "x", "return_token_ids": True}])
def test_no_text_ends_within_a_character(body):
    stream = reply(Stream, stream=True, **body)

    def text(data):
        choice = events(data)[-1][1]["choices"][0]
        return choice["delta"]["content"] if "delta" in choice else choice["text"]

    sent = ["a", "b\ufffd\ufffd", "\ufffd", "", "c", "d", "e\ufffd"]
    assert [text(stream.delta(0, 0, (1,), each)) for each in sent] == ["a", "b", "", "", "\ufffd" * 3 + "c", "d", "e"]
    assert text(stream.end(0, 0, "length", USAGE, (1,), "f\ufffd")) == "\ufffdf"


def test_usage_is_in_a_last_chunk_without_choices():
    stream = reply(Stream, stream=True, prompt="x", n=2, stream_options={"include_usage": True})
    sent = stream.delta(0, 0, (1,), "a") + stream.end(0, 0, "stop", USAGE) + stream.end(0, 1, "length", USAGE)
    assert all("usage" not in value for _, value in events(sent))
    (_, last), done = events(stream.finish())
    usage = {"prompt_tokens": 7, "completion_tokens": 6, "total_tokens": 13}
    assert last == chunk("text_completion", [], usage=usage) and done == "[DONE]"


def test_running_usage_counts_the_tokens_of_each_choice():
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = reply(Stream, stream=True, stream_options=options)
    stream.accepted(0, 7)
    sent = stream.delta(0, 0, (1, 2), "a") + stream.delta(0, 0, (1,), "b") + stream.end(0, 0, "stop", USAGE)
    counted = [value["usage"] for _, value in events(sent)]
    assert [each["completion_tokens"] for each in counted] == [0, 2, 3, 3]
    assert [each["total_tokens"] for each in counted] == [7, 9, 10, 10]


def test_log_probabilities_come_with_their_tokens():
    stream = reply(Stream, stream=True, prompt="x", logprobs=0)
    tokens = [events(stream.delta(0, 0, (likely(token, -1.0, {}),), "t"))[0][1] for token in (1, 2)]
    found = [each["choices"][0]["logprobs"] for each in tokens]
    assert [each["text_offset"] for each in found] == [[0], [1]] and [each["tokens"] for each in found] == [
        ["a"],
        ["b "],
    ]


def test_the_ids_of_the_prompt_come_first():
    stream = reply(Stream, stream=True, prompt=[8, 9], return_token_ids=True)
    sent = stream.delta(0, 0, (1,), "a") + stream.delta(0, 0, (2,), "b") + stream.end(0, 0, "stop", USAGE, (5,))
    choices = [value["choices"][0] for _, value in events(sent)]
    assert [each["token_ids"] for each in choices] == [[1], [2], [5]]
    assert [each.get("prompt_token_ids") for each in choices] == [[8, 9], None, None]
    chat = reply(Stream, stream=True, return_token_ids=True)
    chat.accepted(0, 1, [4])
    (_, first), (_, second) = events(chat.delta(0, 0, (1,), "a"))
    assert first["prompt_token_ids"] == [4] and "prompt_token_ids" not in second


def test_an_error_ends_the_stream():
    stream = reply(Stream, stream=True)
    stream.delta(0, 0, (1,), "a")
    with pytest.raises(ApiError) as failed:
        stream.end(0, 0, "error", USAGE, error="d0 is lost")
    (number, value), done = events(stream.fail(failed.value))
    assert (number, value["error"]["message"], done) == (3, "d0 is lost", "[DONE]")


@pytest.mark.model  # imports the client, which comes with vLLM
def test_the_official_client_reads_the_chunks():
    from openai.types import chat

    stream = reply(Stream, stream=True, logprobs=True, stream_options={"include_usage": True})
    sent = stream.delta(0, 0, (likely(1, -1.0, {}),), "a") + stream.end(0, 0, "stop", USAGE) + stream.finish()
    read = [chat.ChatCompletionChunk.model_validate(event[1], strict=True) for event in events(sent)[:-1]]
    assert [len(each.choices) for each in read] == [1, 1, 1, 0] and read[-1].usage.total_tokens == 10
