"""The endpoints for those who look on, over a scripted client of the broker."""

import asyncio
import json

import pytest
from asgi import Asking, ask
from observations import observation, worker
from starlette.applications import Starlette

from tetri.client import RequestRefused, Unreachable
from tetri.proc.gateway import observatory
from tetri.proc.gateway.answers import failure
from tetri.proc.gateway.counts import Counts
from tetri.proc.gateway.live import Live
from tetri.proc.gateway.observatory import MOST_WATCHERS, Observatory
from tetri.wire.openai import ApiError


class Broker:
    """Knows request r1, with two choices."""

    async def observe(self, epoch, since):
        return observation(worker("p0"), serial=since)

    async def explain(self, rid, choice):
        if rid == "away":
            raise Unreachable("no answer")
        if (rid, choice) not in (("r1", 0), ("r1", 1), ("r1.1", 0)):
            raise RequestRefused(f"nothing is known here of {rid}")
        return {"rid": rid, "choice": choice}


def endpoints(counts=None):
    found = Observatory(Broker())
    handlers = {kind: lambda request, error: failure(error) for kind in (ApiError, Unreachable)}
    return found, Starlette(routes=Live(found, counts or Counts(), 16).routes(), exception_handlers=handlers)


async def fed(found):
    """Run an observatory until it knows something."""
    task = asyncio.ensure_future(found.run())
    await found.later(0)
    return task


def get(app, path, query="", **headers):
    asking = Asking(path, method="GET", headers=headers)
    asking.scope["query_string"] = query.encode()
    return asking.of(app)


@pytest.mark.parametrize(
    ("path", "query", "status", "says"),
    [
        ("r1", "", 200, {"rid": "r1", "choice": 0}),
        ("r1", "choice=1", 200, {"rid": "r1", "choice": 1}),
        ("r1.1", "", 200, {"rid": "r1.1", "choice": 0}),
        ("cmpl-r1", "", 200, {"rid": "r1", "choice": 0}),
        ("my-cmpl-r1", "", 404, "nothing is known here of my-cmpl-r1"),
        ("chatcmpl-r1", "", 200, {"rid": "r1", "choice": 0}),
        ("other", "", 404, "nothing is known here of other"),
        ("x" * 500, "", 404, "nothing is known here of x"),
        ("r1", "choice=x", 400, "choice must be a number"),
        ("r1", "choice=-1", 400, "choice must be a number"),
        ("away", "", 503, "no answer"),
    ],
)
def test_the_timeline_of_a_request(path, query, status, says):
    got = asyncio.run(get(endpoints()[1], f"/live/requests/{path}", query))
    assert got.status == status
    assert got.json() == says if status == 200 else says in got.json()["error"]["message"]


def test_the_minutes_of_an_instance():
    async def talk():
        found, app = endpoints()
        task = await fed(found)
        known, unknown = await get(app, "/live/instances/p0"), await get(app, "/live/instances/p9")
        task.cancel()
        return known, unknown

    known, unknown = asyncio.run(talk())
    assert known.json()["iid"] == "p0" and known.json()["points"][0]["role"] == "decode"
    assert unknown.status == 404 and "'p9'" in unknown.json()["error"]["message"]


def test_metrics_come_in_the_format_that_is_asked_for():
    async def talk():
        counts = Counts()
        counts.answered(200)
        found, app = endpoints(counts)
        task = await fed(found)
        answers = await get(app, "/metrics"), await get(app, "/metrics", accept="application/openmetrics-text")
        task.cancel()
        return answers

    plain, openmetrics = asyncio.run(talk())
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert b'tetri_instance_up{iid="p0",role="decode"} 1.0' in plain.body
    assert b'tetri_http_answers_total{status="200"} 1.0' in plain.body
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert openmetrics.body.endswith(b"# EOF\n")


# ---------------------------------------------------------------- the stream


class Watching(Asking):
    """Reads the stream; `slowly`: only when `read` is set."""

    def __init__(self, slowly=False):
        super().__init__("/live", method="GET")
        self.read, self.began = asyncio.Event(), asyncio.Event()
        if not slowly:
            self.read.set()

    async def send(self, message):
        self.sent.append(message)
        if message.get("body"):
            self.began.set()
            await self.read.wait()

    def frames(self):
        return [json.loads(message["body"][6:]) for message in self.sent if message.get("body")]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(observatory, "WATCHED_S", 0.01)


def test_a_stream_goes_on_until_its_client_goes(quick):
    async def talk():
        found, app = endpoints()
        task, watching = await fed(found), Watching()
        stream = asyncio.ensure_future(watching.of(app))
        while len(watching.frames()) < 4:
            await asyncio.sleep(0.005)
        watching.disconnect()
        got = await stream
        task.cancel()
        return got, watching.frames()

    got, frames = asyncio.run(asyncio.wait_for(talk(), 20))
    assert got.status == 200 and got.headers["content-type"].startswith("text/event-stream")
    assert got.headers["cache-control"] == "no-cache"
    assert ["history" in frame for frame in frames[:4]] == [True, False, False, False]


def test_who_reads_slowly_gets_the_newest_state_and_holds_up_nobody(quick):
    async def talk():
        found, app = endpoints()
        task, slow, other = await fed(found), Watching(slowly=True), Watching()
        streams = [asyncio.ensure_future(each.of(app)) for each in (slow, other)]
        await slow.began.wait()
        while len(other.frames()) < 10:
            await asyncio.sleep(0.005)
        assert len(slow.frames()) == 1  # nothing queues up
        slow.read.set()
        while len(slow.frames()) < 2:
            await asyncio.sleep(0.005)
        last = other.frames()[-1]["now"]
        for each in (slow, other):
            each.disconnect()
        await asyncio.gather(*streams)
        task.cancel()
        return slow.frames()[1]["now"], other.frames()[8]["now"], last

    caught_up, before, last = asyncio.run(asyncio.wait_for(talk(), 20))
    assert before < caught_up <= last + 1


def test_sixty_four_watch_and_the_next_is_refused(quick):
    async def talk():
        found, app = endpoints()
        task, watching = await fed(found), [Watching() for _ in range(MOST_WATCHERS)]
        streams = [asyncio.ensure_future(each.of(app)) for each in watching]
        for each in watching:
            await each.began.wait()
        refused = await get(app, "/live")
        found.close()  # ends them all
        ended = await asyncio.gather(*streams)
        task.cancel()
        return refused, ended

    refused, ended = asyncio.run(asyncio.wait_for(talk(), 30))
    assert refused.status == 503 and "try later" in refused.json()["error"]["message"]
    assert [each.status for each in ended] == [200] * MOST_WATCHERS


def test_who_wants_no_body_gets_none():
    got = ask(endpoints()[1], "/live", method="HEAD")
    assert (got.status, got.body) == (200, b"")
