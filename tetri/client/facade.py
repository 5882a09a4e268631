"""Base classes of `Client` and `AsyncClient`: everything except I/O and waiting."""

from __future__ import annotations

import atexit
import secrets
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Generic, TypeVar
from weakref import WeakSet

from tetri.client.connection import Connection, flush
from tetri.client.conversation import Call, Patience, Request, Session
from tetri.client.frames import Result, TetriError, submit
from tetri.client.place import find_address
from tetri.client.questions import Cancellation
from tetri.clock import Clock
from tetri.request import Turn

Prompt = str | Sequence[int] | None
Messages = Sequence[Turn | Mapping[str, str]] | None
_clients: WeakSet[BaseClient[Any]] = WeakSet()

StreamT = TypeVar("StreamT")
ClientT = TypeVar("ClientT", bound="BaseClient[Any]")
IteratedT = TypeVar("IteratedT", bound="BaseStream[Any]")
CallT = TypeVar("CallT", bound=Call[Any])


def new_secret() -> str:
    """Draw the secret that shows the broker whose requests these are."""
    return secrets.token_hex(16)


def new_request(
    secret: str,
    prompt: Prompt,
    messages: Messages,
    deadline_s: float | None,
    sampling: Mapping[str, Any],
    patience: Patience,
    now: float,
) -> Request:
    """Return a new completion request with a random key. Raises BadRequest."""
    key = secrets.token_hex(8)
    return Request(key, secret, submit(key, secret, prompt, messages, deadline_s, sampling), patience, now)


class BaseClient(ABC, Generic[StreamT]):
    """One connection to a broker and its open calls."""

    def __init__(
        self,
        address: str | None = None,
        timeout: float = 30.0,
        *,
        silence_s: float = 2.0,
        resend_s: float = 1.0,
    ) -> None:
        self.address = address or find_address()
        self._secret = new_secret()
        self._patience = Patience(timeout, silence_s, resend_s)
        self._session = Session()
        self._clock = Clock()
        self._thread = threading.get_ident()  # the last that used the client
        self._prepare()
        self._connection = Connection(self.address)
        _clients.add(self)

    def stream(
        self,
        prompt: Prompt = None,
        *,
        messages: Messages = None,
        deadline_s: float | None = None,
        **sampling: Any,
    ) -> StreamT:
        """Send a request and return an iterator over its text (an asynchronous one for `AsyncClient`). Raises
        TetriError, now or while iterating."""
        now = self._clock.now()
        request = new_request(self._secret, prompt, messages, deadline_s, sampling, self._patience, now)
        stream = self._streaming(request)  # before the request is sent: dropping it cancels the request
        self._start(request)
        return stream

    def __del__(self) -> None:
        if hasattr(self, "_connection"):
            self._shut()

    def _shut(self) -> None:
        """Cancel all open requests and close the connection, without waiting."""
        self._cancel_all()
        self._connection.close()

    def _cancel_all(self) -> None:
        with suppress(TetriError):  # closed before, or another process's
            for cancel in self._session.cancels():
                self._connection.send(cancel)

    def _ask(self, kind: Callable[..., CallT], *what: object) -> CallT:
        """Create and start a call."""
        call = kind(*what, self._patience, self._clock.now())
        self._start(call)
        return call

    def _cancellation(self, rid: str) -> Call[Any]:
        """Cancel the request and return the call that ends with it."""
        request = self._session.request(rid)
        if request is None:
            return self._ask(Cancellation, rid, self._secret)
        self._cancel(request)
        return request

    def _abandon(self, request: Request) -> None:
        """Cancel a request whose result nobody reads, without waiting. Garbage collection calls this in any thread and
        at any time: if the client was last used in another thread, it sends the Cancel when it is used again."""
        sent = None
        if self._thread == threading.get_ident():
            with suppress(TetriError):  # closed, or another process's
                sent = self._clock.now() if self._connection.send(request.cancellation()) else None
        self._session.abandon(request, sent)

    def _send(self) -> None:
        for frame in self._session.tick(self._clock.now()):
            if not self._connection.send(frame):  # the frame is sent again later
                return

    @abstractmethod
    def _prepare(self) -> None:
        """Create what the client needs besides its connection."""

    @abstractmethod
    def _streaming(self, request: Request) -> StreamT:
        """Return the stream of this request."""

    @abstractmethod
    def _start(self, call: Call[Any]) -> None:
        """Add the call to the session and send its first message."""

    @abstractmethod
    def _cancel(self, request: Request) -> None:
        """Send a Cancel now."""


class BaseStream(Generic[ClientT]):
    """The streamed answer to one request."""

    def __init__(self, client: ClientT, request: Request) -> None:
        self._client = client
        self._request = request

    @property
    def rid(self) -> str | None:
        """The request's id, once the broker has accepted it."""
        return self._request.rid

    @property
    def result(self) -> Result | None:
        """The result after the request has ended; None before."""
        return self._request.answer

    def __del__(self) -> None:
        self._abandon()

    def _abandon(self) -> None:
        """Cancel the request if it is neither ended nor cancelled, without waiting for its end."""
        if self._wanted():
            self._client._abandon(self._request)

    def _ready(self) -> bool:
        """Whether a piece of text is available or the request has ended."""
        return bool(self._request.pieces) or self._request.ended

    def _piece(self) -> str | None:
        """Return the next piece of text; None at the end. Call it when `_ready`. Raises TetriError."""
        self._client._connection.check_process()
        if self._request.pieces:
            return self._request.pieces.popleft()
        self._request.outcome()
        return None

    def _wanted(self) -> bool:
        """Whether the request is neither ended nor cancelled."""
        return not (self._request.ended or self._request.cancelling)


class Iteration(Generic[IteratedT]):
    """One loop over a stream. A loop that ends early drops it, whatever else holds the stream, and the request is
    cancelled."""

    def __init__(self, stream: IteratedT) -> None:
        self._stream = stream

    def __del__(self) -> None:
        self._stream._abandon()


@atexit.register
def _close_clients() -> None:
    """Cancel what is open at the end of the process. Clients that a daemon thread may be using at this moment are left:
    the broker notices that they are gone."""
    running = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
    for client in list(_clients):
        if client._thread not in running:
            client._shut()
    flush()
