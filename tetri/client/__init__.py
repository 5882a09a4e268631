"""Talk to a broker: `Client` and, for asyncio, `AsyncClient`. docs/protocol.md is enough to write another.

    client = Client()
    print(client.generate("The capital of France is", max_tokens=8).text)

`frames` is bytes, `conversation` what the client knows and asks next (pure), `sync` and `aio` move the
bytes, `facade` is what those two share.
"""

from tetri.client.aio import AsyncClient, AsyncStream
from tetri.client.frames import BadRequest, RequestFailed, RequestRefused, Result, TetriError, Unreachable
from tetri.client.place import find_address
from tetri.client.sync import Client, Stream

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "BadRequest",
    "Client",
    "RequestFailed",
    "RequestRefused",
    "Result",
    "Stream",
    "TetriError",
    "Unreachable",
    "find_address",
]
