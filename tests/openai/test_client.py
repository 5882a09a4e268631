"""The official client of OpenAI, which knows the URL of a gateway and nothing else."""

from __future__ import annotations

from contextlib import closing

import httpx
import openai
import pytest

MODEL, PROMPT = "emulated", "The sea is"
LONG = 4000  # tokens that nobody waits for
TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0, timeout=30) as made:
        yield made


def complete(client, prompt=PROMPT, **options):
    return client.completions.create(**{"model": MODEL, "prompt": prompt, "max_tokens": 8, "temperature": 0, **options})


def chat(client, messages=TURNS, **options):
    asked = {"model": MODEL, "messages": messages, "max_completion_tokens": 8, "temperature": 0, **options}
    return client.chat.completions.create(**asked)


def texts(completion):
    return [choice.text for choice in sorted(completion.choices, key=lambda choice: choice.index)]


# ---------------------------------------------------------------- answers


def test_models(client):
    (model,) = client.models.list()
    assert model.id == MODEL and model.root == "emulated" and model.max_model_len == 8192


def test_a_completion(client):
    made = complete(client)
    assert (made.object, made.model, made.choices[0].finish_reason) == ("text_completion", MODEL, "length")
    assert (made.usage.prompt_tokens, made.usage.completion_tokens, made.usage.total_tokens) == (10, 8, 18)
    assert made.choices[0].text == complete(client, [*PROMPT.encode()]).choices[0].text
    assert len(complete(client, max_tokens=openai.omit).choices[0].text.split()) == 16


def test_several_prompts(client):
    made = complete(client, [PROMPT, "Another"])
    assert texts(made) == [*texts(complete(client)), *texts(complete(client, "Another"))]
    assert made.usage.prompt_tokens == 17 and made.usage.completion_tokens == 16


def test_a_streamed_completion_is_the_same(client):
    whole, pieces = complete(client), [*complete(client, stream=True, stream_options={"include_usage": True})]
    assert "".join(choice.text for piece in pieces for choice in piece.choices) == whole.choices[0].text
    assert [choice.finish_reason for piece in pieces for choice in piece.choices if choice.finish_reason] == ["length"]
    assert pieces[-1].choices == [] and pieces[-1].usage == whole.usage
    assert all(piece.usage is None for piece in pieces[:-1]) and len({piece.id for piece in pieces}) == 1


def test_only_who_asks_for_events_gets_their_numbers(server):
    """vLLM's benchmark, for one, fails at anything but lines of data."""
    asked = {
        "json": {"prompt": PROMPT, "max_tokens": 2, "stream": True},
        "headers": {"authorization": f"Bearer {server.key}"},
    }
    plain = httpx.post(f"{server.url}/v1/completions", **asked).text
    asked["headers"]["accept"] = "text/event-stream"
    numbered = httpx.post(f"{server.url}/v1/completions", **asked).text.split("\n\n")[:-1]
    assert all(event.startswith("data: ") and "\n" not in event for event in plain.split("\n\n")[:-1])
    assert [event.partition("\n")[0] for event in numbered[:-1]] == [f"id: {at + 1}" for at in range(len(numbered) - 1)]


def test_a_chat(client):
    made = chat(client)
    assert (made.object, made.choices[0].finish_reason) == ("chat.completion", "length")
    assert made.choices[0].message.role == "assistant" and len(made.choices[0].message.content.split()) == 8


def test_a_streamed_chat_is_the_same(client):
    whole, pieces = chat(client), [*chat(client, stream=True, stream_options={"include_usage": True})]
    deltas = [choice.delta for piece in pieces for choice in piece.choices]
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    assert [delta.role for delta in deltas if delta.role] == ["assistant"] and deltas[0].content == ""
    assert pieces[-1].choices == [] and pieces[-1].usage == whole.usage


def test_parts_and_developers(client):
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": "there"}]
    turns = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    plain = [TURNS[0], {"role": "user", "content": "Hello\nthere"}]
    assert chat(client, turns).choices == chat(client, plain).choices != chat(client).choices


def test_four_choices(client):
    made = complete(client, n=4, temperature=1, seed=5)
    assert sorted(choice.index for choice in made.choices) == [0, 1, 2, 3] and len(set(texts(made))) == 4
    assert made.usage.prompt_tokens == 10 and made.usage.completion_tokens == 32
    assert texts(made) == [complete(client, temperature=1, seed=5 + index).choices[0].text for index in range(4)]


def test_four_streamed_choices(client):
    found = dict.fromkeys(range(4), "")
    ends, roles = list[int](), list[int]()
    for piece in chat(client, n=4, temperature=1, seed=5, stream=True):
        for choice in piece.choices:
            found[choice.index] += choice.delta.content or ""
            ends += [choice.index] if choice.finish_reason else []
            roles += [choice.index] if choice.delta.role else []
    whole = chat(client, n=4, temperature=1, seed=5)
    assert found == {choice.index: choice.message.content for choice in whole.choices}
    assert sorted(ends) == sorted(roles) == [0, 1, 2, 3]


def test_log_probabilities(client):
    made = complete(client, logprobs=2).choices[0]
    found = made.logprobs
    assert "".join(found.tokens) == made.text and len(found.token_logprobs) == len(found.top_logprobs) == 8
    assert found.text_offset == [sum(map(len, found.tokens[:at])) for at in range(8)]
    for token, value, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert len(top) == 2 and top[token] == value == max(top.values()) <= 0
    assert complete(client).choices[0].logprobs is None


def test_log_probabilities_of_a_chat(client):
    whole = chat(client, logprobs=True, top_logprobs=3).choices[0]
    streamed = [piece.choices[0] for piece in chat(client, logprobs=True, top_logprobs=3, stream=True)]
    records = [record for choice in streamed if choice.logprobs for record in choice.logprobs.content]
    assert records == whole.logprobs.content and len(records) == 8
    assert b"".join(bytes(record.bytes) for record in records).decode() == whole.message.content
    assert {len(record.top_logprobs) for record in records} == {3}


def test_stop(client):
    text = complete(client).choices[0].text
    stop = text.split()[3]
    for asked in (stop, ["no such text", stop]):
        made = complete(client, stop=asked).choices[0]
        assert (made.text, made.finish_reason) == (text.partition(stop)[0], "stop")
    pieces = [piece.choices[0] for piece in complete(client, stop=stop, stream=True)]
    assert "".join(piece.text for piece in pieces) == text.partition(stop)[0] and pieces[-1].finish_reason == "stop"


def test_seed(client):
    drawn = [complete(client, temperature=1, seed=seed).choices[0].text for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_bias(client):
    made = complete(client, logit_bias={"97": 100}, max_tokens=3)
    assert made.choices[0].text == "aaa"


# ---------------------------------------------------------------- the end of a client


@pytest.mark.parametrize("ask", [complete, chat])
def test_a_stream_that_is_closed_is_cancelled(client, server, ask):
    with ask(client, max_tokens=LONG, stream=True, extra_body={"ignore_eos": True}) as stream:
        next(iter(stream))
        server.wait_open(1)
    server.wait_open(0)


def test_a_client_that_does_not_wait_any_longer_cancels(client, server):
    with pytest.raises(openai.APITimeoutError):
        complete(client, max_tokens=LONG, timeout=0.3, extra_body={"ignore_eos": True})
    server.wait_open(0)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"n": 2}, "n must be 1"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_tokens": 9000}, "max_tokens"),
        ({"echo": True}, "echo"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"prompt": None}, "prompt"),
    ],
)
def test_bad_requests(client, options, says):
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, **options)
    assert says in refused.value.body["message"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}, "tools"),
        ({"messages": []}, "messages"),
    ],
)
def test_bad_chats(client, options, says):
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, **options)
    assert says in refused.value.body["message"]


def test_an_unknown_model(client):
    with pytest.raises(openai.NotFoundError, match="nobody"):
        complete(client, model="nobody")


def test_a_wrong_key(client):
    with pytest.raises(openai.AuthenticationError):
        complete(client.with_options(api_key="wrong"))


def test_a_request_id_comes_back(client):
    raw = client.completions.with_raw_response.create(
        model=MODEL, prompt=PROMPT, max_tokens=1, extra_headers={"x-request-id": "mine"}
    )
    assert raw.headers["x-request-id"] == "mine"


def test_a_full_broker_is_asked_again(client, server):
    """A request beyond the most that may be open gets 429, which says when to ask again; then it is served."""
    statuses = []
    hooks = {
        "response": [lambda response: statuses.append((response.status_code, response.headers.get("retry-after-ms")))]
    }
    with (
        httpx.Client(event_hooks=hooks, timeout=30) as http,
        client.with_options(http_client=http, max_retries=3) as other,
    ):
        held = [complete(client, max_tokens=LONG, stream=True, extra_body={"ignore_eos": True}) for _ in range(16)]
        server.wait_open(16)
        with pytest.raises(openai.RateLimitError):
            complete(client)
        hooks["response"].append(lambda response: [stream.close() for stream in held])
        http.event_hooks = hooks
        with closing(other):
            assert complete(other).choices[0].finish_reason == "length"
    *refused, served = statuses
    assert {status for status, _ in refused} == {429} and served[0] == 200
    assert all(float(wait_ms) > 0 for _, wait_ms in refused)
    server.wait_open(0)
