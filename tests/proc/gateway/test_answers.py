"""Completions and chat: from what a client asks to what it gets, over a scripted client of the broker."""

import asyncio
import gc
import json

import pytest
from asgi import Asking
from scripted import Client, result, two

from tetri.client import BadRequest, RequestFailed, RequestLost, RequestRefused, TetriError, Unreachable
from tetri.client.frames import Event
from tetri.proc.gateway.answers import Completions, Model, api_error, failure
from tetri.proc.gateway.counts import Counts
from tetri.request import Slo
from tetri.wire.openai import ApiError, read_chat, read_completion

MODEL = Model(["m"], "/m", 100, lambda token: b"t")
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


class Tokens:
    async def ids(self, prompt, turns):
        return [7, 8, 9]


def asking(body, headers=(), given="42"):
    """`given`: the id that the client has given the request; None: none, and the guard has made it "42"."""
    found = Asking(body=json.dumps(body).encode(), headers={"x-request-id": given, **dict(headers)})
    found.scope["state"]["x-request-id"] = "42"
    return found


def endpoint(client, counts=None):
    return Completions(read_completion, "cmpl", client, MODEL, Tokens(), counts or Counts())


def answered(client, body, headers=(), counts=None):
    return asyncio.run(asking(body, headers).of(endpoint(client, counts)))


def events(got):
    """The data of server-sent events."""
    return [part.partition(b"data: ")[2] for part in got.body.split(b"\n\n") if part]


def test_an_answer_is_one_body():
    client, counts = Client(two()), Counts()
    got = answered(client, {"prompt": "Hi", "max_tokens": 5, "user": "me"}, counts=counts)
    assert (got.status, got.headers["content-type"]) == (200, "application/json")
    assert int(got.headers["content-length"]) == len(got.body)
    body = got.json()
    assert body["id"] == "cmpl-42" and body["choices"][0]["text"] == "ab" and "tetri" not in body
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert client.asked[0]["prompt"] == "Hi" and client.asked[0]["default_tokens"] == 5
    assert client.asked[0]["deadline_s"] is None and client.asked[0]["slo"] is None
    assert counts.plain()["ignored"] == {"user": 1} and counts.open == 0


def test_a_stream_is_events_as_they_come():
    got = answered(Client(two()), {"prompt": "Hi", "stream": True})
    assert got.headers["content-type"].startswith("text/event-stream") and "content-length" not in got.headers
    *chunks, last = events(got)
    assert last == b"[DONE]" and [json.loads(chunk)["choices"][0]["text"] for chunk in chunks] == ["a", "b"]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("given", "name"), [("42", "42"), (None, "r1")])
def test_an_answer_leads_to_how_it_was_served(stream, given, name):
    """Its id has that of its request at the broker, unless the client has given another."""
    asked = asking({"prompt": "Hi", "stream": stream}, given=given)
    got = asyncio.run(asked.of(endpoint(Client(two()))))
    parts = [json.loads(part) for part in events(got)[:-1]] if stream else [got.json()]
    assert {part["id"] for part in parts} == {f"cmpl-{name}"} and asked.scope["state"]["x-request-id"] == name
    assert got.headers["x-tetri-rid"] == "r1"


def test_an_answer_to_several_prompts_names_the_request_of_each():
    got = answered(Client(two(), two()), {"prompt": ["Hi", "Ho"]})
    assert got.headers["x-tetri-rid"] == "r1, r2"
    many = answered(Client(*(two() for _ in range(20))), {"prompt": ["Hi"] * 20})
    assert many.headers["x-tetri-rid"].split(", ") == [f"r{n}" for n in range(1, 17)]


def test_the_collector_rests_while_a_body_is_read():
    """500,000 lists took ten times as long with it, and held up all streams."""
    seen = []

    def read(body, *rest):
        seen.append(gc.isenabled())
        return read_completion(body, *rest)

    chat = Completions(read, "cmpl", Client(two()), MODEL, Tokens(), Counts())
    assert asyncio.run(asking({"prompt": "Hi"}).of(chat)).status == 200
    with pytest.raises(ApiError):
        asyncio.run(asking({"prompt": 5}).of(chat))
    assert seen == [False, False] and gc.isenabled()


def test_what_never_fits_in_the_broker_is_not_to_be_tried_again():
    small = Model(["m"], "/m", 100, lambda token: b"t", most_open=4)

    def status(prompts):
        client = Client(*(two() for _ in range(prompts)))
        small_one = Completions(read_completion, "cmpl", client, small, Tokens(), Counts())
        return asyncio.run(asking({"prompt": ["a"] * prompts}).of(small_one)).status

    assert status(4) == 200
    with pytest.raises(ApiError, match="5 prompts x 1 are too many: the broker has 4 choices at once") as refused:
        status(5)
    assert refused.value.status == 400


def test_chat_is_answered_too():
    client = Client(two())
    chat = Completions(read_chat, "chatcmpl", client, MODEL, Tokens(), Counts())
    got = asyncio.run(asking(CHAT).of(chat))
    assert got.json()["choices"][0]["message"]["content"] == "ab"
    assert client.asked[0]["messages"] == [{"role": "user", "content": "Hi"}]


def test_several_prompts_are_asked_at_once_and_answered_together():
    there = asyncio.Event()

    async def arrived():
        there.set()

    client = Client([there.wait, *two()], [arrived, *two()])  # the first waits for the second
    got = answered(client, {"prompt": ["x", "y"]})
    assert [(each["index"], each["text"]) for each in got.json()["choices"]] == [(0, "ab"), (1, "ab")]


def test_what_a_client_asks_of_tetri_is_in_headers():
    client = Client(two(), two())
    got = answered(client, {"prompt": "Hi"}, {"x-tetri-receipt": "1", "x-tetri-deadline-ms": "1500"})
    record = got.json()["tetri"]["choices"][0]
    assert record["receipt"]["adopted"] == 3 and record["timeline"] == {"queued": 0.5}
    assert (record["ttft_s"], record["jct_s"]) == (0.25, 0.75) and client.asked[0]["deadline_s"] == 1.5
    streamed = answered(client, {"prompt": "Hi", "stream": True}, {"x-tetri-receipt": "1"})
    assert "tetri" in json.loads(events(streamed)[-2]) and "tetri" not in json.loads(events(streamed)[0])


@pytest.mark.parametrize(
    ("headers", "slo"),
    [
        ({"x-slo-ttft-ms": "500", "x-slo-tpot-ms": "12.5"}, Slo(ttft_s=0.5, tpot_s=0.0125)),
        ({"x-slo-tpot-ms": "86400000"}, Slo(tpot_s=86400.0)),
    ],
)
def test_limits_of_latency_are_in_headers_and_hold_for_each_prompt(headers, slo):
    client = Client(two(), two())
    answered(client, {"prompt": ["Hi", "Ho"]}, headers)
    assert [asked["slo"] for asked in client.asked] == [slo, slo]


@pytest.mark.parametrize("name", ["x-tetri-deadline-ms", "x-slo-ttft-ms", "x-slo-tpot-ms"])
@pytest.mark.parametrize("given", ["0", "-1", "1e3", "1.", "", "soon", "inf", "nan", "10000000000", "9" * 5000])
def test_a_time_in_a_header_is_a_number_of_milliseconds(name, given):
    with pytest.raises(ApiError, match=f"^{name} must be a number of milliseconds above 0") as refused:
        answered(Client(two()), {"prompt": "Hi"}, {name: given})
    assert refused.value.status == 400


def test_running_usage_counts_the_prompt_from_the_first_event_on():
    options = {"include_usage": True, "continuous_usage_stats": True}
    got = answered(Client(two()), {"prompt": "Hi", "stream": True, "stream_options": options})
    assert [json.loads(chunk)["usage"]["total_tokens"] for chunk in events(got)[:2]] == [4, 5]


def test_a_text_whose_ids_are_wanted_is_tokenised_here():
    client = Client(two(), two())
    got = answered(client, {"prompt": ["Hi", "Ho"], "return_token_ids": True})
    assert [each["prompt_token_ids"] for each in got.json()["choices"]] == [[7, 8, 9]] * 2
    assert [each["prompt"] for each in client.asked] == [[7, 8, 9]] * 2
    assert got.json()["choices"][0]["token_ids"] == [1, 2]


# ---------------------------------------------------------------- what goes wrong


def test_more_tokens_than_the_model_has_are_refused():
    with pytest.raises(ApiError, match="max_tokens"):
        answered(Client(two()), {"prompt": "Hi", "max_tokens": 101})


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RequestRefused("full", 1.0), 429),
        (RequestRefused("too long"), 400),
        (RequestLost("no request 7 is known here"), 503),
        (BadRequest("no"), 400),
        (RequestFailed("NaN", result("error")), 500),
        (Unreachable("nobody"), 503),
        (TetriError("closed"), 503),
        (ApiError(404, "x"), 404),
    ],
)
def test_the_status_of_errors(error, status):
    assert api_error(error).status == status and failure(error).status_code == status
    assert ("retry-after-ms" in failure(error).headers) == (status == 429)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("prompt", ["Hi", ["Hi", "Ho"]])
def test_an_error_before_any_output_is_no_stream(stream, prompt):
    with pytest.raises(RequestRefused):
        answered(Client([RequestRefused("full", 1.0)], [asyncio.Event().wait]), {"prompt": prompt, "stream": stream})


def test_an_error_after_output_ends_the_stream():
    first, _ = two()
    *chunks, error, last = events(answered(Client([first, Unreachable("gone")]), {"prompt": "Hi", "stream": True}))
    assert len(chunks) == 1 and last == b"[DONE]"
    assert json.loads(error)["error"] == {
        "message": "gone",
        "type": "ServiceUnavailableError",
        "param": None,
        "code": 503,
    }


def test_a_deadline_that_passes_is_an_error():
    late = Event(0, "", (), result("deadline", 0))
    with pytest.raises(ApiError) as passed:
        answered(Client([late]), {"prompt": "Hi"})
    assert passed.value.status == 504
    first, _ = two()
    got = answered(Client([first, late]), {"prompt": "Hi", "stream": True})
    assert json.loads(events(got)[-2])["error"]["code"] == 504


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("started", [True, False])
def test_a_client_that_goes_cancels_its_request(stream, started):
    async def asked():
        there, first = asyncio.Event(), two()[:1]
        counts, client = Counts(), Client([*first * started, _set(there), asyncio.Event().wait, *two()])
        ask = asking({"prompt": "Hi", "stream": stream})
        task = asyncio.ensure_future(endpoint(client, counts)(ask.scope, ask.feed.get, ask.send))
        await there.wait()
        assert counts.open == 1 and client.dropped == 0
        ask.disconnect()
        await asyncio.wait_for(task, 5)
        assert (counts.open, client.dropped) == (0, 1)
        return ask.sent

    assert bool(asyncio.run(asked())) == (stream and started)


def _set(event):
    async def reached():
        event.set()

    return reached
