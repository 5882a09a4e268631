"""The endpoints for those who look on: the stream of the live page, the timeline of a request, the minutes of an
instance, and the metrics. None of them asks a worker."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import msgspec
from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from tetri.client import RequestRefused
from tetri.proc.gateway.answers import EVENTS, while_connected
from tetri.proc.gateway.counts import Counts
from tetri.proc.gateway.guard import JSON
from tetri.proc.gateway.observatory import Observatory
from tetri.proc.metrics import DeploymentCollector, Found
from tetri.request import rid_of
from tetri.wire.openai import ApiError

MOST_RID = 123  # characters: with the number of a choice, names in messages have 128 at most


class Live:
    """The endpoints. `block_tokens`: of a KV block."""

    def __init__(self, observatory: Observatory, counts: Counts, block_tokens: int) -> None:
        self._observatory, self._counts, self._block_tokens = observatory, counts, block_tokens

    def routes(self) -> list[Route]:
        """The endpoints."""
        return [
            Route("/live", Stream(self._observatory), methods=["GET"]),
            Route("/live/requests/{rid}", self._explain, methods=["GET"]),
            Route("/live/instances/{iid}", self._instance, methods=["GET"]),
            Route("/metrics", self._metrics, methods=["GET"]),
        ]

    async def _explain(self, request: Request) -> Response:
        """How a choice of a request was served, or is."""
        rid, choice = request.path_params["rid"], request.query_params.get("choice", "0")
        if not re.fullmatch(r"\d{1,4}", choice, re.ASCII):
            raise ApiError(400, f"choice must be a number from 0 on, got {choice[:40]!r}", param="choice")
        try:
            timeline = await self._observatory.explain(rid_of(rid)[:MOST_RID], int(choice))
        except RequestRefused as error:
            raise ApiError(404, str(error)) from None
        return _json(timeline)

    async def _instance(self, request: Request) -> Response:
        """The last minutes of an instance."""
        iid = request.path_params["iid"]
        points = self._observatory.history.instance(iid)
        if points is None:
            raise ApiError(404, f"there is no instance {iid[:40]!r}, and was none in the last minutes")
        return _json({"iid": iid, "points": [*points]})

    async def _metrics(self, request: Request) -> Response:
        """The metrics, in the format that the scraper asks for."""
        found = Found(self._observatory.observation, self._block_tokens, self._counts.plain())
        encode, kind = choose_encoder(request.headers.get("accept", ""))
        # In a thread, since it takes some milliseconds with many instances, and streams would wait.
        body = await asyncio.to_thread(encode, DeploymentCollector(lambda: found))
        return Response(body, headers={"content-type": kind})


class Stream:
    """The stream of the live page, as server-sent events. Who reads slowly gets fewer of them."""

    def __init__(self, observatory: Observatory) -> None:
        self._observatory = observatory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._observatory.watching():
            await send({"type": "http.response.start", "status": 200, "headers": [*EVENTS]})
            if scope["method"] == "GET":  # not HEAD
                await while_connected(receive, self._frames(send))
            await send({"type": "http.response.body", "body": b""})

    async def _frames(self, send: Send) -> None:
        seen, turn = None, 0
        while True:
            await self._observatory.later(turn)
            if self._observatory.closed:
                break
            data, seen, turn = self._observatory.frame(seen)
            await send({"type": "http.response.body", "body": data, "more_body": True})


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type=JSON)
