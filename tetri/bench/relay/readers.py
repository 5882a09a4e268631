"""Clients that read many streams and note when each token came: one of ZeroMQ, one of HTTP. They decode afterwards, so
that they take little time from what is measured."""

from __future__ import annotations

import json
import re
import selectors
import socket
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import zmq

from tetri.bench.report import BenchError
from tetri.client.facade import new_secret
from tetri.request import Sampling
from tetri.wire.clients import BrokerReply, Delta, Done, Refused, Submit
from tetri.wire.codec import decode, encode

PATIENCE_S = 60.0  # without anything new
TEXT = re.compile(rb'"text": ?"([^"]*)"')
LAST = b"[DONE]\n\n"
Piece = tuple[float, bytes]


class Stream(NamedTuple):
    """When the tokens of one stream arrived, and in how many messages or events."""

    tokens: list[float]
    events: int


def over_zmq(address: str, streams: int, tokens: int, first: Callable[[], None]) -> list[Stream]:
    """Read streams from the broker. `first` is called when the first token has come. Raises BenchError."""
    with zmq.Context[Any]() as context, context.socket(zmq.DEALER) as client:
        client.set(zmq.LINGER, 0)
        client.set(zmq.RCVHWM, 0)
        client.connect(address)
        sampling = Sampling(max_tokens=tokens, ignore_eos=True)
        for number in range(streams):
            client.send(
                encode(Submit(key=f"{number}{new_secret()}", secret=new_secret(), prompt=[1], sampling=sampling))
            )
        pieces = list[Piece]()
        ended = 0
        while ended < streams:
            if not client.poll(round(1000 * PATIENCE_S)):
                raise BenchError(f"ZeroMQ: {streams - ended} streams have not ended")
            data = client.recv()
            pieces.append((time.monotonic(), data))
            if len(pieces) == streams + 1:  # after the answers to all Submits
                first()
            ended += b"\xa4done" in data[:16]
    return _of_messages(pieces)


def _of_messages(pieces: list[Piece]) -> list[Stream]:
    found: dict[str, list[float]] = {}
    events: dict[str, int] = {}
    for at, data in pieces:
        message = decode(data, BrokerReply)
        match message:
            case Delta(rid=rid, ids=ids):
                found.setdefault(rid, []).extend([at] * len(ids))
                events[rid] = events.get(rid, 0) + bool(ids)
            case Refused(reason=reason):
                raise BenchError(f"ZeroMQ: {reason}")
            case Done(error=str(error)):
                raise BenchError(f"ZeroMQ: {error}")
    return [Stream(times, events[rid]) for rid, times in found.items()]


def over_http(url: str, streams: int, tokens: int, first: Callable[[], None]) -> list[Stream]:
    """Read streams from a gateway, each over a connection of its own. Raises BenchError and OSError."""
    with ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        pieces = [list[Piece]() for _ in range(streams)]
        for number in range(streams):
            selector.register(stack.enter_context(_asked(url, tokens)), selectors.EVENT_READ, number)
        begun = False
        for number, piece in _read(selector):
            pieces[number].append(piece)
            if piece[1][:9] == b"HTTP/1.1 " and piece[1][9:12] != b"200":
                raise BenchError(f"HTTP: {piece[1][:500].decode(errors='replace')!r}")
            if not begun and b"\ndata:" in piece[1]:
                begun = True
                first()
    return [of_events(each) for each in pieces]


def _read(selector: selectors.BaseSelector) -> Iterator[tuple[int, Piece]]:
    """What arrives, by the number of its connection, until all streams have ended."""
    while open_streams := len(selector.get_map()):
        if not (ready := selector.select(PATIENCE_S)):
            raise BenchError(f"HTTP: {open_streams} streams have not ended")
        for key, _ in ready:
            data = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
            yield key.data, (time.monotonic(), data)
            if not data or LAST in data:
                selector.unregister(key.fileobj)


@contextmanager
def _asked(url: str, tokens: int) -> Iterator[socket.socket]:
    """A connection over which one streamed completion was asked for."""
    where = urlsplit(url)
    body = json.dumps({"prompt": [1], "max_tokens": tokens, "ignore_eos": True, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((where.hostname, where.port), PATIENCE_S) as made:
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        made.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        yield made


def of_events(pieces: list[Piece]) -> Stream:
    """The tokens in the pieces of one answer: each has one letter."""
    whole = b"".join(data for _, data in pieces)
    ends = [*accumulate(len(data) for _, data in pieces)]
    times, events = list[float](), 0
    for found in TEXT.finditer(whole):
        if found[1]:
            at = pieces[bisect_right(ends, found.end() - 1)][0]
            times += [at] * len(found[1])
            events += 1
    return Stream(times, events)
