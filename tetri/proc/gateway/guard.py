"""Lets requests in: checks the Host header, the API key and the size of the body, and gives each request an id."""

from __future__ import annotations

import ipaddress
import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tetri.proc.gateway.keys import Keys
from tetri.wire.openai import ApiError

REQUEST_ID = "x-request-id"
PROBED = frozenset(("/health", "/ping", "/ready", "/version"))  # by programs that have no key
_ID = re.compile(rb"[\x21-\x7e]{1,128}")
JSON = "application/json"


class Guard:
    """ASGI middleware. `names`: hosts, besides addresses and localhost, by which clients may call this gateway; "*":
    any. `body_kib`: most KiB of a body. `count` gets the status of every answer. `public`: paths that need no key,
    besides those of probes."""

    def __init__(
        self,
        app: ASGIApp,
        names: Sequence[str],
        keys: Keys,
        body_kib: int,
        count: Callable[[int], None],
        public: Iterable[str] = (),
    ) -> None:
        self._app, self._names, self._keys, self._count = app, tuple(names), keys, count
        self._public = PROBED.union(public)
        self._most_bytes = body_kib << 10
        self._too_large = ApiError(413, f"a body may have {body_kib} KiB: send less, or raise gateway.body_kib")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])  # of several with one name, the last
        given = headers.get(REQUEST_ID.encode(), b"")
        name = given.decode() if _ID.fullmatch(given) else secrets.token_hex(16)
        scope["state"][REQUEST_ID] = name

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = scope["state"][REQUEST_ID]
                self._count(message["status"])
            await send(message)

        problem = self._problem(scope["path"], headers)
        if problem is not None:
            await error_response(problem)(scope, receive, named)
        elif b"content-length" in headers:  # else the body may be of any length
            await self._app(scope, receive, named)
        else:
            await self._app(scope, self._limited(receive), named)

    def _limited(self, receive: Receive) -> Receive:
        """`receive` that raises ApiError when the body is too large."""
        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._most_bytes:
                raise self._too_large
            return message

        return limited

    def _problem(self, path: str, headers: dict[bytes, bytes]) -> ApiError | None:
        host = headers.get(b"host", b"").decode("latin-1")
        if not self._known(host):
            advice = "call it by its address, or add the name to gateway.names"
            return ApiError(403, f"this gateway is not called {host[:80]!r}: {advice}")
        if path not in self._public and not self._keys.allow(headers.get(b"authorization", b"")):
            return ApiError(401, "a valid API key is needed: send it as Authorization: Bearer KEY")
        if int(headers.get(b"content-length", b"0")) > self._most_bytes:
            return self._too_large
        return None

    def _known(self, host: str) -> bool:
        """Whether a Host header names this gateway. A page of another site that lets its own name point here (DNS
        rebinding) has that name; it cannot have an address. Programs other than browsers may send none."""
        bare = host.rpartition("]")[0][1:] if host.startswith("[") else host.partition(":")[0]
        bare = bare.rstrip(".").lower()
        if not host or bare == "localhost" or any(fnmatchcase(bare, name.lower()) for name in self._names):
            return True
        try:
            ipaddress.ip_address(bare)
        except ValueError:
            return False
        return True


def error_response(error: ApiError, retry_after_s: float | None = None, close: bool = False) -> Response:
    """The answer to a request that fails. `close`: the connection, too."""
    headers = {"www-authenticate": "Bearer"} if error.status == 401 else {}
    if close:
        headers["connection"] = "close"
    if retry_after_s is not None:
        # OpenAI's clients read the milliseconds; the seconds, which must be whole, are never sooner.
        milliseconds = max(1, round(1000 * retry_after_s))
        headers |= {"retry-after": str(-(-milliseconds // 1000)), "retry-after-ms": str(milliseconds)}
    return Response(error.body(), error.status, headers, JSON)
