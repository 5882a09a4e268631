"""A client made of pyzmq and msgpack and docs/protocol.md, and of nothing else: no line of tetri.

For tests that must not believe tetri's own client. One request at a time may be waited for, others go on
beside it: what arrives for them is kept. Not thread-safe.
"""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import zmq

Message = dict[str, Any]  # as on the wire, `type` included
Prompt = str | list[int] | list[Message]  # text, token ids, or a conversation
Answer = tuple[list[Any], str, Message]  # tokens (ids, or arrays of id, logprob, top with logprobs), text, the Done

VERSION = b"\x04"


class NoAnswer(Exception):
    """Nothing came within the time."""


class RawClient:
    """`address` is the broker's clients address; `timeout` the seconds that any one answer may take. One that is to go
    on with another's request gets its `secret`."""

    def __init__(self, address: str, timeout: float = 10.0) -> None:
        self.timeout = timeout
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.sndhwm = self._socket.rcvhwm = 1000
        self._socket.connect(address)
        self._kept: list[Message] = []
        self.secret = secrets.token_hex(16)

    def close(self) -> None:
        """Leave without a word, as a client that dies does."""
        self._socket.close(0)
        self._context.term()

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------ one message

    def send(self, kind: str, **fields: Any) -> None:
        self.send_frames(VERSION + msgpack.packb({"type": kind, **fields}))

    def send_frames(self, *frames: bytes) -> None:
        """Anything at all, garbage included."""
        self._socket.send_multipart(frames)

    def receive(self, **wanted: Any) -> Message:
        """The next message in which all these fields have these values; others are kept for later. A set of
        values means any of them. Raises NoAnswer."""
        return self._next(lambda message: _is(message, wanted), str(wanted))

    def _next(self, fits: Callable[[Message], bool], what: str) -> Message:
        for at, message in enumerate(self._kept):
            if fits(message):
                return self._kept.pop(at)
        end = time.monotonic() + self.timeout
        while self._socket.poll(max(0, int((end - time.monotonic()) * 1000))):
            (frame,) = self._socket.recv_multipart()
            assert frame[:1] == VERSION, frame[:20]
            message = msgpack.unpackb(frame[1:], strict_map_key=False)
            if fits(message):
                return message
            self._kept.append(message)
        raise NoAnswer(f"no {what} within {self.timeout} s; other messages: {self._kept[:5]}")

    # ------------------------------------------------------------ one verb each

    def submit(
        self, prompt: Prompt, key: str | None = None, deadline_s: float | None = None, n: int = 1, **sampling: Any
    ) -> Message:
        """The broker's Accepted or Refused. `n`: number of choices; `sampling` are fields of AskedSampling, as in
        `max_tokens=8`."""
        key = key or uuid.uuid4().hex
        turns = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)
        fields: Message = {"key": key, "secret": self.secret, "messages" if turns else "prompt": prompt}
        if deadline_s is not None:
            fields["deadline_s"] = deadline_s
        if n != 1:
            fields["n"] = n
        if sampling:
            fields["sampling"] = sampling
        self.send("submit", **fields)
        return self.receive(type={"accepted", "refused"}, key=key)

    def stream(self, rid: str, choice: int = 0) -> Iterator[Message]:
        """Every Delta of a choice and at last its Done. Raises AssertionError when a token is lost or comes twice."""
        known = 0
        while True:
            message = self.receive(type={"delta", "done"}, rid=rid, choice=choice)
            if message["type"] == "done":
                assert message["usage"]["completion_tokens"] == known, (known, message)
                yield message
                return
            assert message["start"] == known, (known, message)
            known += len(message["ids"])
            yield message

    def generate(self, prompt: Prompt, **fields: Any) -> Answer:
        """The answer to a request of one choice; AssertionError when it is refused."""
        (answer,) = self.choices(prompt, 1, **fields)
        return answer

    def choices(self, prompt: Prompt, n: int, **fields: Any) -> list[Answer]:
        """The answers of all choices of a request; AssertionError when it is refused."""
        answer = self.submit(prompt, n=n, **fields)
        assert answer["type"] == "accepted", answer
        return [self._answer(answer["rid"], choice) for choice in range(n)]

    def _answer(self, rid: str, choice: int) -> Answer:
        *deltas, done = self.stream(rid, choice)
        tokens = [token for delta in deltas for token in delta["ids"]]
        return tokens, "".join(delta["text"] for delta in deltas), done

    def cancel(self, rid: str) -> Message:
        """The Done of the choice that ended first (whatever else came before is dropped) or the Refused."""
        self.send("cancel", rid=rid, secret=self.secret)
        while True:
            message = self._next(lambda one: rid in (one.get("rid"), one.get("key")), f"end of {rid}")
            if message["type"] in ("done", "refused"):
                return message

    def attach(self, rid: str, start: int = 0, choice: int = 0) -> None:
        """Ask for the stream of a choice from token `start` on."""
        self.send("attach", rid=rid, secret=self.secret, start=start, choice=choice)

    def inspect(self) -> Message:
        """The Status."""
        self.send("inspect")
        return self.receive(type="status")


def _is(message: Message, wanted: Message) -> bool:
    return all(
        message.get(name) in value if isinstance(value, set) else message.get(name) == value
        for name, value in wanted.items()
    )
