"""Who is let in: by Host header, API key and size; and the id of each request."""

import asyncio

import pytest
from asgi import Asking, ask
from starlette.responses import Response

from tetri.proc.gateway.guard import Guard, error_response
from tetri.proc.gateway.keys import Keys, hashed
from tetri.wire.openai import ApiError

KIB = 1


async def app(scope, receive, send):
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message["body"]), message["more_body"]
    await Response(str(size))(scope, receive, send)


def guarded(names=(), keys=(), count=lambda status: None):
    return Guard(app, names, Keys(map(hashed, keys)), KIB, count)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("LOCALHOST", 200),
        ("127.0.0.1:8000", 200),
        ("10.1.2.3", 200),
        ("[::1]:8000", 200),
        ("llm.example.com:1", 200),
        ("a.internal.", 200),
        (None, 200),
        ("evil.example.com", 403),
        ("127.0.0.1.evil.com", 403),
        ("localhost.evil.com", 403),
        ("[evil.com]", 403),
        ("\u00fc:1", 403),
    ],
)
def test_a_page_that_lets_its_name_point_here_is_refused(host, status):
    got = ask(guarded(["llm.example.com", "*.internal"]), headers={"host": host})
    assert got.status == status
    if status == 403:
        assert "add the name to gateway.names" in got.json()["error"]["message"]
        assert ask(guarded(["*"]), headers={"host": host}).status == 200


def test_without_a_key_only_probes_are_answered():
    door = guarded(keys=[b"k"])
    refused = ask(door, "/v1/models")
    assert refused.status == 401 and refused.headers["www-authenticate"] == "Bearer"
    assert refused.json()["error"]["type"] == "AuthenticationError"
    assert ask(door, "/v1/models", headers={"authorization": "Bearer k"}).status == 200
    assert [ask(door, path).status for path in ("/health", "/ping", "/ready", "/version")] == [200] * 4
    assert ask(door, "/openapi.json").status == 401
    page = Guard(app, (), Keys([hashed(b"k")]), KIB, lambda status: None, ["/", "/page.js"])
    paths = ("/", "/page.js", "/health", "/live", "/metrics", "/page.js/x")
    assert [ask(page, path).status for path in paths] == [200, 200, 200, 401, 401, 401]


def test_a_request_has_the_id_that_its_client_gave_it_or_a_new_one():
    given = ask(guarded(), headers={"x-request-id": "my-id"})
    assert given.headers["x-request-id"] == "my-id"
    for bad in ("", "with space", "x" * 129):
        made = {ask(guarded(), headers={"x-request-id": bad}).headers["x-request-id"] for _ in range(2)}
        assert len(made) == 2 and all(len(each) == 32 for each in made)


def test_the_status_of_each_answer_is_counted():
    counted = []
    door = guarded(count=counted.append)
    ask(door)
    ask(door, headers={"host": "evil.com"})
    assert counted == [200, 403]


def test_a_body_that_says_that_it_is_too_large_is_not_read():
    async def asked():
        asking = Asking(body=b"", headers={"content-length": "1025"})
        got = await asking.of(guarded())
        return got, asking.feed.qsize()

    got, unread = asyncio.run(asked())
    assert got.status == 413 and "1 KiB" in got.json()["error"]["message"] and unread == 1
    assert ask(guarded(), body=b"x" * 1024).body == b"1024"


def test_a_body_without_a_length_is_read_as_far_as_it_may_go():
    async def asked(parts):
        asking = Asking(headers={"content-length": None})
        asking.feed.get_nowait()
        for part in parts:
            asking.feed.put_nowait({"type": "http.request", "body": b"x" * part, "more_body": True})
        asking.feed.put_nowait({"type": "http.request", "body": b"", "more_body": False})
        return (await asking.of(guarded())).body

    assert asyncio.run(asked([1000, 24])) == b"1024"
    with pytest.raises(ApiError, match="1 KiB") as refused:
        asyncio.run(asked([1000, 25]))
    assert refused.value.status == 413


@pytest.mark.parametrize(("seconds", "whole", "exact"), [(1.0, "1", "1000"), (0.25, "1", "250"), (2.001, "3", "2001")])
def test_a_client_is_told_when_to_come_again(seconds, whole, exact):
    headers = error_response(ApiError(429, "later"), seconds).headers
    assert (headers["retry-after"], headers["retry-after-ms"]) == (whole, exact)
    assert "retry-after" not in error_response(ApiError(429, "later")).headers
