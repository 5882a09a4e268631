"""Client library of tetri: `Client`, for asyncio `AsyncClient`, and `Operator`. See docs/protocol.md for the protocol.

    client = Client()
    print(client.generate("The capital of France is", max_tokens=8).text)

`frames` encodes and decodes messages, `conversation` holds the state of each request and `session` all of a client (no
I/O), `connection` has the socket, `sync` and `aio` wait for it, and `facade` has what those two share.
"""

from tetri.client.aio import AsyncClient, AsyncStream
from tetri.client.frames import (
    BadRequest,
    Event,
    RequestFailed,
    RequestLost,
    RequestRefused,
    Result,
    TetriError,
    Unreachable,
)
from tetri.client.operator import Operator
from tetri.client.place import find_address
from tetri.client.sync import Client, Stream

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "BadRequest",
    "Client",
    "Event",
    "Operator",
    "RequestFailed",
    "RequestLost",
    "RequestRefused",
    "Result",
    "Stream",
    "TetriError",
    "Unreachable",
    "find_address",
]
