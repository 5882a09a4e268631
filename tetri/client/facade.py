"""Base classes of `Client` and `AsyncClient`: everything except I/O and waiting."""

from __future__ import annotations

import atexit
import secrets
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Generic, TypeVar, cast
from weakref import WeakSet

from tetri.client.connection import Connection, flush
from tetri.client.conversation import Call, Patience, Request
from tetri.client.frames import BadRequest, Result, TetriError, submit
from tetri.client.place import find_address
from tetri.client.questions import Cancellation
from tetri.client.session import Session
from tetri.clock import Clock
from tetri.request import Slo, Turn

Prompt = str | Sequence[int] | None
Messages = Sequence[Turn | Mapping[str, str]] | None
_clients: WeakSet[BaseClient[Any, Any]] = WeakSet()

TextsT = TypeVar("TextsT")
EventsT = TypeVar("EventsT")
PieceT = TypeVar("PieceT")
ClientT = TypeVar("ClientT", bound="BaseClient[Any, Any]")
IteratedT = TypeVar("IteratedT", bound="BaseStream[Any, Any]")
CallT = TypeVar("CallT", bound=Call[Any])


def new_secret() -> str:
    """Draw the secret that shows the broker whose requests these are."""
    return secrets.token_hex(16)


def new_request(
    secret: str,
    prompt: Prompt,
    messages: Messages,
    sampling: Mapping[str, Any],
    patience: Patience,
    now: float,
    *,
    n: int = 1,
    deadline_s: float | None = None,
    default_tokens: int | None = None,
    slo: Slo | None = None,
) -> Request:
    """Return a new completion request with a random key. Raises BadRequest."""
    key = secrets.token_hex(8)
    given = prompt, messages, sampling, n, deadline_s, default_tokens, slo
    return Request(key, secret, submit(key, secret, *given), patience, now, n)


class BaseClient(ABC, Generic[TextsT, EventsT]):
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
        n: int = 1,
        deadline_s: float | None = None,
        slo: Slo | None = None,
        **sampling: Any,
    ) -> TextsT:
        """Send a request and return an iterator over its text (an asynchronous one for `AsyncClient`). Raises
        TetriError, now or while iterating."""
        if n != 1:
            raise BadRequest("stream takes n = 1: use events, which names the choice of each text")
        request = self._request(prompt, messages, sampling, deadline_s=deadline_s, slo=slo)
        choice = request.choices[0]
        return cast(TextsT, self._begin(request, choice.has_text, choice.text))

    def events(
        self,
        prompt: Prompt = None,
        *,
        messages: Messages = None,
        n: int = 1,
        deadline_s: float | None = None,
        default_tokens: int | None = None,
        slo: Slo | None = None,
        **sampling: Any,
    ) -> EventsT:
        """Send a request and return an iterator over its Events: the new text and tokens of one of its `n` choices, and
        its Result with the last of them. What arrives while the caller is busy becomes one event. The first choice that
        fails ends the iterator. `default_tokens`: the most output tokens without `max_tokens`, or fewer if fewer fit.
        `slo`: its limits of latency, which the deployment works towards. Raises TetriError, now or while iterating."""
        asked = {"n": n, "deadline_s": deadline_s, "default_tokens": default_tokens, "slo": slo}
        request = self._request(prompt, messages, sampling, **asked)
        return cast(EventsT, self._begin(request, request.has_event, request.event))

    def _request(self, prompt: Prompt, messages: Messages, sampling: Mapping[str, Any], **asked: Any) -> Request:
        return new_request(self._secret, prompt, messages, sampling, self._patience, self._clock.now(), **asked)

    def _begin(self, request: Request, waits: Callable[[], bool], read: Callable[[], PieceT]) -> Any:
        stream = self._streaming(request, waits, read)  # before the request is sent: dropping it cancels the request
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
    def _streaming(self, request: Request, waits: Callable[[], bool], read: Callable[[], PieceT]) -> Any:
        """Return the stream of this request. `waits`: whether `read` has something to return."""

    @abstractmethod
    def _start(self, call: Call[Any]) -> None:
        """Add the call to the session and send its first message."""

    @abstractmethod
    def _cancel(self, request: Request) -> None:
        """Send a Cancel now."""


class BaseStream(Generic[ClientT, PieceT]):
    """The streamed answer to one request."""

    def __init__(
        self, client: ClientT, request: Request, waits: Callable[[], bool], read: Callable[[], PieceT]
    ) -> None:
        self._client = client
        self._request = request
        self._waits, self._read = waits, read

    @property
    def rid(self) -> str | None:
        """The request's id, once the broker has accepted it."""
        return self._request.rid

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt, once the broker has accepted the request."""
        return self._request.prompt_tokens

    @property
    def result(self) -> Result | None:
        """The result after the request has ended; None before."""
        return self._request.answer

    def __del__(self) -> None:
        self._abandon()

    def close(self) -> None:
        """Cancel the request if it has not ended, without waiting for its end."""
        self._abandon()

    def _abandon(self) -> None:
        """Cancel the request if it is neither ended nor cancelled, without waiting for its end."""
        if self._wanted():
            self._client._abandon(self._request)

    def _ready(self) -> bool:
        """Whether a piece is available or the request has ended."""
        return self._waits() or self._request.ended

    def _piece(self) -> PieceT | None:
        """Return the next piece; None at the end. Call it when `_ready`. Raises TetriError."""
        self._client._connection.check_process()
        if self._waits():
            return self._read()
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
