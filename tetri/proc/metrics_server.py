"""Serves /metrics without a gateway, from a thread of the broker's process, which asks the broker as operators do."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server

from tetri.client import Client, TetriError
from tetri.net.errors import NetError
from tetri.proc.metrics import DeploymentCollector, Found

HOST = "127.0.0.1"
FRESH_S = 1.0  # for so long an answer of the broker serves all scrapes
BROKER_S = 2.0  # a broker that does not answer for so long is not there


class Source:
    """Where the metrics are. Any thread may call `find`. `address`: of the broker's socket for operators."""

    def __init__(self, address: str, block_tokens: int) -> None:
        self._address, self._block_tokens = address, block_tokens
        self._lock = threading.Lock()
        self._found, self._until = Found(None, block_tokens), 0.0

    def find(self) -> Found:
        """What the broker has said last, at most `FRESH_S` ago."""
        with self._lock:
            if time.monotonic() >= self._until:
                self._found = self._ask()
                self._until = time.monotonic() + FRESH_S
            return self._found

    def _ask(self) -> Found:
        try:
            with Client(self._address, BROKER_S) as client:
                return Found(client.observe(), self._block_tokens)
        except TetriError:
            return Found(None, self._block_tokens)


@contextmanager
def served(port: int, source: Source) -> Iterator[None]:
    """Serve the metrics at a port of this host's loopback address. Raises NetError."""
    registry = CollectorRegistry()
    try:
        server, thread = start_http_server(port, HOST, registry)
    except OSError as error:
        advice = "choose another with --set broker.metrics_port=PORT, or 0 for none"
        raise NetError(f"http://{HOST}:{port} cannot be used ({error.strerror}): {advice}") from None
    registry.register(DeploymentCollector(source.find))
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
