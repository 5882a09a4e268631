"""Completions and chat: from the body of a request to the bytes of its answer, streamed or not."""

from __future__ import annotations

import asyncio
import gc
import re
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tetri.client import (
    AsyncClient,
    BadRequest,
    RequestFailed,
    RequestLost,
    RequestRefused,
    Result,
    TetriError,
    Unreachable,
)
from tetri.client.aio import AsyncEvents
from tetri.proc.gateway.counts import Counts
from tetri.proc.gateway.guard import JSON, REQUEST_ID, error_response
from tetri.proc.gateway.tokens import Tokens
from tetri.request import MAX_DEADLINE_S, MAX_LIMIT_S, Slo
from tetri.wire.openai import Answer, ApiError, Asked, Reply, Stream

RECEIPT, DEADLINE, RID = b"x-tetri-receipt", b"x-tetri-deadline-ms", b"x-tetri-rid"
TTFT, TPOT = b"x-slo-ttft-ms", b"x-slo-tpot-ms"  # as at the gateways of Kubernetes (llm-d)
MOST_RIDS = 16  # in one header
EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
EVENTS += [(b"x-accel-buffering", b"no")]  # or nginx would gather them
_MS = re.compile(rb"\d{1,10}(\.\d{1,6})?")


@dataclass(frozen=True, slots=True)
class Model:
    """What is served. `names`: of the model; `root`: the folder of its checkpoint; `context`: most tokens of prompt and
    output; `token_text`: from a token to its bytes; `most_open`: choices that the broker has at once."""

    names: Sequence[str]
    root: str
    context: int
    token_text: Callable[[int], bytes]
    most_open: int = 4096


class Completions:
    """An endpoint. `read`: what turns a body into what is asked for; `prefix`: of the ids of answers."""

    def __init__(
        self,
        read: Callable[[bytes, Sequence[str], int], Asked],
        prefix: str,
        client: AsyncClient,
        model: Model,
        tokens: Tokens,
        counts: Counts,
    ) -> None:
        self._read, self._prefix = read, prefix
        self._client, self._model, self._tokens, self._counts = client, model, tokens, counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await Request(scope, receive).body()
        with uncollected():
            asked = self._read(body, self._model.names, self._model.context)
        if (len(asked.prompts) - 1) * asked.n >= self._model.most_open:  # the last prompt would be refused each time
            most = f"the broker has {self._model.most_open} choices at once (broker.max_open)"
            raise ApiError(400, f"{len(asked.prompts)} prompts x {asked.n} are too many: {most}")
        self._counts.ignored(asked.ignored)
        headers = dict(scope["headers"])
        state, prefix = scope["state"], self._prefix
        given = headers.get(REQUEST_ID.encode()) == state[REQUEST_ID].encode()

        def accepted(rid: str) -> None:  # by the broker: its id serves all, unless the client has given one
            if not given:
                state[REQUEST_ID] = rid
                reply.rename(f"{prefix}-{rid}")

        limits = {"deadline_s": _seconds(headers, DEADLINE, MAX_DEADLINE_S), "slo": _slo(headers)}
        answering = Answering(self._client, asked, headers.get(RECEIPT) == b"1", limits, send, accepted)
        made = asked, f"{prefix}-{state[REQUEST_ID]}", int(time.time()), self._model.token_text
        # Who names this type reads such events; other clients may break on those with an id.
        numbered = b"text/event-stream" in headers.get(b"accept", b"")
        reply = Stream(*made, numbered=numbered) if asked.stream else Answer(*made)
        with self._counts.opened():
            await while_connected(receive, self._answer(answering, reply, asked))

    async def _answer(self, answering: Answering, reply: Reply, asked: Asked) -> None:
        submits = asked.submits()
        if asked.ids:  # the answer has the ids of the prompts, which the broker does not tell
            for index, submit in enumerate(submits):
                if (ids := submit.get("prompt")) is None or isinstance(ids, str):
                    ids = await self._tokens.ids(submit.pop("prompt", None), asked.turns)
                    submit.pop("messages", None)
                reply.accepted(index, len(ids), ids)
                submit["prompt"] = ids
        await answering.run(reply, submits)


class Answering:
    """One answer that is being given. `limits`: its deadline and limits of latency. `accepted` gets the id of
    the first request that the broker has accepted."""

    def __init__(
        self,
        client: AsyncClient,
        asked: Asked,
        receipt: bool,
        limits: Mapping[str, Any],
        send: Send,
        accepted: Callable[[str], None],
    ) -> None:
        self._client, self._asked, self._send, self._accepted = client, asked, send, accepted
        self._receipt, self._limits = receipt, limits
        self._started = False
        self._rids: dict[int, str] = {}  # by index of the prompt

    async def run(self, reply: Reply, submits: Sequence[Mapping[str, Any]]) -> None:
        """Answer all prompts at once. Raises ApiError if that fails before any output was sent; else the answer ends
        with the error."""
        try:
            if len(submits) == 1:
                await self._serve(reply, 0, submits[0])
            else:
                await self._serve_all(reply, submits)
            last = reply.finish()
        except (TetriError, ApiError) as error:
            if not self._started:
                raise
            last = reply.fail(api_error(error))
        await self._write(last, more=False)

    async def _serve_all(self, reply: Reply, submits: Sequence[Mapping[str, Any]]) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for index, submit in enumerate(submits):
                    group.create_task(self._serve(reply, index, submit))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _serve(self, reply: Reply, index: int, submit: Mapping[str, Any]) -> None:
        stream = self._client.events(**submit, **self._limits)
        async for event in stream:
            if index not in self._rids:
                self._begin(reply, index, stream)
            if (result := event.result) is None:
                data = reply.delta(index, event.choice, event.tokens, event.text)
            else:
                ended = index, event.choice, result.finish_reason, result.usage, event.tokens, event.text
                data = reply.end(*ended, record=_record(result) if self._receipt else None)
            if data:
                await self._write(data)

    def _begin(self, reply: Reply, index: int, stream: AsyncEvents) -> None:
        """The broker has accepted a prompt."""
        rid = stream.rid or ""
        if not self._rids:
            self._accepted(rid)
        self._rids[index] = rid
        if self._asked.running_usage:
            reply.accepted(index, stream.prompt_tokens)

    async def _write(self, data: bytes, more: bool = True) -> None:
        if not self._started:
            self._started = True
            length = [] if self._asked.stream else [(b"content-length", b"%d" % len(data))]
            headers = EVENTS if self._asked.stream else [(b"content-type", JSON.encode()), *length]
            rids = [rid for _, rid in sorted(self._rids.items())][:MOST_RIDS]
            headers = [*headers, (RID, ", ".join(rids).encode())]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": data, "more_body": more})


def api_error(error: Exception) -> ApiError:
    """What a client is told of an error of the broker's client."""
    match error:
        case ApiError():
            return error
        case BadRequest():
            return ApiError(400, str(error))
        case RequestLost():
            return ApiError(503, f"the broker has lost the request ({error}): try again")
        case RequestRefused():
            return ApiError(400 if error.retry_after_s is None else 429, str(error))
        case RequestFailed():
            return ApiError(500, str(error))
        case Unreachable():
            return ApiError(503, str(error))
    return ApiError(503, f"the gateway ends or has lost its broker ({error}): try again")


def failure(error: Exception) -> Response:
    """The answer to a request that fails before any output."""
    wait_s = error.retry_after_s if isinstance(error, RequestRefused) else None
    return error_response(api_error(error), wait_s)


@contextmanager
def uncollected() -> Iterator[None]:
    """For reading a body: a large one has so many values that Python's garbage collector, which would look at all of
    them again and again, takes longer than the reading, and streams wait."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Await `work`, which is cancelled when the client disconnects."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))
    if not task.cancelled():
        task.result()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _slo(headers: Mapping[bytes, bytes]) -> Slo | None:
    if TTFT not in headers and TPOT not in headers:
        return None
    return Slo(ttft_s=_seconds(headers, TTFT, MAX_LIMIT_S), tpot_s=_seconds(headers, TPOT, MAX_LIMIT_S))


def _seconds(headers: Mapping[bytes, bytes], name: bytes, most_s: float) -> float | None:
    """The seconds in a header that gives milliseconds; None without it."""
    given = headers.get(name)
    if given is None:
        return None
    if not _MS.fullmatch(given) or not 0 < (seconds := float(given) / 1000) <= most_s:
        got = given[:40].decode("latin-1")
        says = f"a number of milliseconds above 0 and at most {1000 * most_s:.0f}"
        raise ApiError(400, f"{name.decode()} must be {says}, got {got!r}")
    return seconds


def _record(result: Result) -> dict[str, Any]:
    """How a choice was served."""
    plain = result.to_json()
    return {name: plain[name] for name in ("receipt", "timeline", "ttft_s", "jct_s", "slo", "slo_result")}
