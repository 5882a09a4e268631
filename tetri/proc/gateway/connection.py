"""One TCP connection to a gateway: uvicorn's protocol, with limits on what a slow or hostile client can hold.

A whole request must arrive in time, its head must be short, and an answer must be read. Whatever waits too long is cut
off, so a client costs a gateway one descriptor and little memory, for a bounded time.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from tetri.proc.gateway.guard import error_response
from tetri.wire.openai import ApiError

HEAD_BYTES = 64 << 10  # of the request line and all headers
UNSENT_BYTES = 64 << 10  # that the kernel takes; else it takes MiB, and who reads slowly would get what is long past
SPARE = 32  # connections above the limit, which get an error; further ones are closed at once
FRAMING = (b"content-length", b"transfer-encoding")  # headers that say where a body ends
NOT_HTTP = "this is no valid HTTP request"


@dataclass(frozen=True, slots=True)
class Limits:
    """`request_s`: a whole request must arrive within this. `stall_s`: a client that reads nothing of its answer for so
    long is cut off. `connections`: requests of further ones get an error."""

    request_s: float
    stall_s: float
    connections: int


class Connection(HttpToolsProtocol):
    """`limits` comes first; uvicorn gives the rest."""

    def __init__(self, limits: Limits, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self._limits = limits
        self._arriving: asyncio.TimerHandle | None = None  # while a request is expected or incomplete
        self._stalled: asyncio.TimerHandle | None = None  # while the client does not read
        self._in_head, self._head_bytes = False, 0
        self._declining = False  # the parser reads a head that has been read before
        self._served: RequestResponseCycle | None = None  # the request that is answered; `cycle` is the latest

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Give the first request its time to arrive."""
        super().connection_made(transport)
        if (connected := transport.get_extra_info("socket")) is not None:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        most = self._limits.connections
        if len(self.connections) > most + SPARE:
            transport.abort()
        elif len(self.connections) > most:
            error = ApiError(503, f"this gateway has {most} connections and may have no more: try later")
            self.app = error_response(error, close=True)
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        self._stop_arriving()
        self._stop_stalled()
        super().connection_lost(exc)
        if self._served is not None and not self._served.response_complete:
            self._served.disconnected = True
            self._served.message_event.set()

    def data_received(self, data: bytes) -> None:
        """Parse, and measure the head of the request."""
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
        except HttpParserError:
            self.refuse(400, NOT_HTTP)
        if self.transport.is_closing():
            return
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES:
                self.refuse(431, f"the headers of a request may have {HEAD_BYTES} bytes")
        elif self._arriving is None and (self.cycle is None or self.cycle.response_complete):
            self._expect()  # the data began no request, but has stopped the timer of idle connections

    def _parse(self, data: bytes) -> None:
        """Parse what has arrived. The parser takes what follows a request that offers another protocol for that
        protocol, as Java's client offers HTTP/2 with its first request. Such a request is answered in HTTP/1.1: a new
        parser, which is told where the body ends, goes on after its head."""
        while True:
            try:
                self.parser.feed_data(data)
                return
            except HttpParserUpgrade as offer:
                data = data[offer.args[0] :]
            framing = [b"%b: %b\r\n" % header for header in self.headers if header[0] in FRAMING]
            self.parser = HttpRequestParser(self)
            self._declining = True
            self.parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n" % b"".join(framing))
            self._declining = False

    def on_message_begin(self) -> None:
        """A request begins."""
        if not self._declining:
            super().on_message_begin()
            self._in_head, self._head_bytes = True, 0
            self._expect()

    def on_url(self, url: bytes) -> None:
        """A part of the request line."""
        if not self._declining:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        if not self._declining:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is whole: the request is served while its body arrives."""
        if not self._declining:
            self._in_head = False
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The request is whole, unless the parser has taken its body for another protocol."""
        if not self.parser.should_upgrade():
            self._stop_arriving()
            super().on_message_complete()

    def pause_writing(self) -> None:
        """The client does not read: cut it off if that lasts."""
        super().pause_writing()
        self._stalled = self.loop.call_later(self._limits.stall_s, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads again."""
        self._stop_stalled()
        super().resume_writing()

    def refuse(self, status: int, why: str) -> None:
        """Answer with an error, unless an answer has begun, and close the connection."""
        answering = self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
        if not (answering or self.pipeline):
            body = ApiError(status, why).body()
            head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
            self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._served = cycle
        super()._start_asgi_task(cycle, app)

    def _expect(self) -> None:
        """Give the next request its time to arrive."""
        self._stop_arriving()
        self._arriving = self.loop.call_later(self._limits.request_s, self._too_late)

    def _stop_arriving(self) -> None:
        if self._arriving is not None:
            self._arriving.cancel()
            self._arriving = None

    def _stop_stalled(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _too_late(self) -> None:
        self._arriving = None
        if self.pipeline:  # it waits for the answer to an earlier one
            self._expect()
        elif self._in_head or (self.cycle is not None and not self.cycle.response_complete):
            self.refuse(408, f"the request did not arrive within {self._limits.request_s:g} s")
        else:
            self.transport.close()


def protocol(limits: Limits) -> Callable[..., Connection]:
    """What uvicorn makes of each connection."""
    return lambda **uvicorn: Connection(limits, **uvicorn)
