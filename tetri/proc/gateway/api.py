"""The endpoints of a gateway and what is around them, as an ASGI application."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

import tetri
from tetri.client import AsyncClient, TetriError
from tetri.config import GatewayConfig
from tetri.proc.gateway import page_files
from tetri.proc.gateway.answers import RID, Completions, Model, failure, uncollected
from tetri.proc.gateway.counts import Counts
from tetri.proc.gateway.guard import JSON, REQUEST_ID, Guard, error_response
from tetri.proc.gateway.keys import Keys
from tetri.proc.gateway.live import Live
from tetri.proc.gateway.tokens import Tokens, bare
from tetri.wire import openai
from tetri.wire.openai import ApiError


class Api:
    """The endpoints besides completions."""

    def __init__(self, client: AsyncClient, model: Model, tokens: Tokens) -> None:
        self._client, self._model, self._tokens = client, model, tokens
        self._models = openai.model_list(model.names, int(time.time()), model.root, model.context)

    def routes(self) -> list[Route]:
        """The endpoints."""
        get, post = ["GET"], ["POST"]
        return [
            Route("/v1/models", self._list_models, methods=get),
            Route("/tokenize", self._tokenize, methods=post),
            Route("/detokenize", self._detokenize, methods=post),
            Route("/version", self._version, methods=get),
            Route("/ready", self._ready, methods=get),
            *(Route(path, self._health, methods=[*get, *post]) for path in ("/health", "/ping")),
            Route("/openapi.json", self._describe, methods=get),
        ]

    async def _health(self, request: Request) -> Response:
        """The process runs."""
        return Response()

    async def _version(self, request: Request) -> Response:
        return Response(openai.server_version(tetri.__version__), media_type=JSON)

    async def _describe(self, request: Request) -> Response:
        return _json(openai.openapi(tetri.__version__))

    async def _list_models(self, request: Request) -> Response:
        return Response(self._models, media_type=JSON)

    async def _ready(self, request: Request) -> Response:
        """Whether each pair of instances has lately carried KV."""
        found = await self._client.readiness()
        return _json(found, 200 if found["ready"] else 503)

    async def _tokenize(self, request: Request) -> Response:
        body = await request.body()
        with uncollected():
            asked = openai.read_tokenize(body, self._model.names)
        ids = await self._tokens.ids(asked.prompt, asked.turns)
        if asked.prompt is not None and not asked.specials:
            ids = bare(ids, await self._tokens.ids("", None))
        texts = await asyncio.to_thread(self._texts, ids) if asked.texts else None
        return Response(openai.tokenized(ids, self._model.context, texts), media_type=JSON)

    async def _detokenize(self, request: Request) -> Response:
        ids = openai.read_detokenize(await request.body(), self._model.names)
        text = await asyncio.to_thread(lambda: b"".join(map(self._model.token_text, ids)).decode("utf-8", "replace"))
        return Response(openai.detokenized(text), media_type=JSON)

    def _texts(self, ids: list[int]) -> list[str]:
        return [self._model.token_text(number).decode("utf-8", "replace") for number in ids]


def application(
    settings: GatewayConfig,
    keys: Keys,
    client: AsyncClient,
    model: Model,
    tokens: Tokens,
    counts: Counts,
    live: Live,
) -> Starlette:
    """The ASGI application of a gateway."""
    common, page = (client, model, tokens, counts), page_files.routes()
    routes = [
        Route("/v1/completions", Completions(openai.read_completion, "cmpl", *common), methods=["POST"]),
        Route("/v1/chat/completions", Completions(openai.read_chat, "chatcmpl", *common), methods=["POST"]),
        *Api(client, model, tokens).routes(),
        *live.routes(),
        *page,
    ]

    async def broken(request: Request, error: Exception) -> Response:  # what `guard` does for all other answers
        counts.answered(500)
        found = error_response(ApiError(500, "the gateway failed: its log says why"))
        found.headers[REQUEST_ID] = request.scope["state"][REQUEST_ID]
        return found

    public = [route.path for route in page]  # there is no data in them
    guard = Middleware(Guard, listed(settings.names), keys, settings.body_kib, counts.answered, public)
    handlers: Any = {HTTPException: _http, ClientDisconnect: _nobody, Exception: broken}
    handlers |= {kind: lambda request, error: failure(error) for kind in (ApiError, TetriError)}
    return Starlette(routes=routes, middleware=[*_cross_origin(settings), guard], exception_handlers=handlers)


def listed(text: str) -> list[str]:
    """The parts of a setting that has several, between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def _cross_origin(settings: GatewayConfig) -> list[Middleware]:
    origins = listed(settings.origins)
    if not origins:
        return []
    exposed = [REQUEST_ID, RID.decode()]
    ways: dict[str, Any] = {"allow_methods": ["*"], "allow_headers": ["*"], "expose_headers": exposed}
    return [Middleware(CORSMiddleware, allow_origins=origins, **ways)]


async def _http(request: Request, error: HTTPException) -> Response:
    """No such path, or not with this method."""
    found = error_response(ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail.lower()}"))
    found.headers.update(error.headers or {})
    return found


async def _nobody(request: Request, error: ClientDisconnect) -> Response:
    return Response()  # which nobody gets


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type=JSON)
