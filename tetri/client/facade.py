"""Base classes of `Client` and `AsyncClient`: everything except I/O and waiting."""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import zmq

from tetri.client.conversation import Call, Patience, Request, Session
from tetri.client.frames import MAX_RECEIVED, Result, TetriError, submit
from tetri.client.place import find_address
from tetri.client.questions import Cancellation
from tetri.clock import Clock
from tetri.request import Turn

Prompt = str | Sequence[int] | None
Messages = Sequence[Turn | Mapping[str, str]] | None
LINGER_MS = 200  # on close: long enough to send a last Cancel

StreamT = TypeVar("StreamT")
ClientT = TypeVar("ClientT")
CallT = TypeVar("CallT", bound=Call[Any])


def dealer(context: zmq.Context[Any], address: str) -> Any:
    """Return a socket connected to the broker, which may start later. Raises TetriError for an invalid address."""
    socket = context.socket(zmq.DEALER)
    socket.linger = LINGER_MS
    socket.sndhwm = socket.rcvhwm = 1000
    socket.maxmsgsize = MAX_RECEIVED
    try:
        socket.connect(address)
    except zmq.ZMQError as error:
        socket.close(0)
        raise TetriError(f"{address!r} is not a valid broker address: {error.strerror}") from None
    return socket


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

    _socket: Any

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
        self._connect()

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
        return self._streaming(self._ask(new_request, self._secret, prompt, messages, deadline_s, sampling))

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

    def _check_open(self) -> None:
        if self._socket.closed:
            raise TetriError("the client was closed")

    @abstractmethod
    def _connect(self) -> None:
        """Create the socket. Raises TetriError."""

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

    def _ready(self) -> bool:
        """Whether a piece of text is available or the request has ended."""
        return bool(self._request.pieces) or self._request.ended

    def _piece(self) -> str | None:
        """Return the next piece of text; None at the end. Call it when `_ready`. Raises TetriError."""
        if self._request.pieces:
            return self._request.pieces.popleft()
        self._request.outcome()
        return None

    def _wanted(self) -> bool:
        """Whether the request is neither ended nor cancelled."""
        return not (self._request.ended or self._request.cancelling)
