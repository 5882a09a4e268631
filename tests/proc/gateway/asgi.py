"""Calls an ASGI application as a server would."""

import asyncio
import json
from dataclasses import dataclass


@dataclass
class Got:
    """An answer: its `status`, `headers` and `body`."""

    status: int
    headers: dict
    body: bytes

    def json(self):
        return json.loads(self.body)


class Asking:
    """One request of an application. `feed` is what `receive` returns next; `got` what was sent."""

    def __init__(self, path="/", body=b"", method="POST", headers=()):
        given = {"host": "localhost", "content-length": str(len(body)), **dict(headers)}
        raw = [(name.encode(), value.encode()) for name, value in given.items() if value is not None]
        self.scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "headers": raw}
        self.scope |= {"query_string": b"", "root_path": "", "scheme": "http", "server": ("localhost", 80), "state": {}}
        self.feed = asyncio.Queue()
        self.feed.put_nowait({"type": "http.request", "body": body, "more_body": False})
        self.sent = []

    def disconnect(self):
        self.feed.put_nowait({"type": "http.disconnect"})

    async def send(self, message):
        self.sent.append(message)

    async def of(self, app):
        await app(self.scope, self.feed.get, self.send)
        return self.got()

    def got(self):
        start, *parts = self.sent
        headers = {name.decode(): value.decode() for name, value in start["headers"]}
        return Got(start["status"], headers, b"".join(part.get("body", b"") for part in parts))


def ask(app, *args, **named):
    async def asked():
        return await Asking(*args, **named).of(app)

    return asyncio.run(asked())
