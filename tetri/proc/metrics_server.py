"""Serves /metrics without a gateway, from a thread of the broker's process, which asks the broker as operators do."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

from tetri.client import Client, TetriError
from tetri.net.errors import NetError
from tetri.proc.metrics import DeploymentCollector, Found

HOST = "127.0.0.1"
FRESH_S = 1.0  # for so long an answer of the broker serves all scrapes
BROKER_S = 2.0  # a broker that does not answer for so long is not there
MOST_SCRAPES = 16  # at once; further connections are closed


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


class Handler(WSGIRequestHandler):
    """Answers one scrape, and logs nothing."""

    timeout = 5.0  # a client that sends and reads nothing for so many seconds is cut off

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""


class Server(ThreadingMixIn, WSGIServer):
    """A thread for each scrape, but not for any number of them: they are threads of the broker."""

    daemon_threads = True
    request_queue_size = MOST_SCRAPES

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._free = threading.Semaphore(MOST_SCRAPES)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread, if there may be one more."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nobody is to know of a client that has gone, or was too slow."""


@contextmanager
def served(port: int, source: Source) -> Iterator[None]:
    """Serve the metrics at a port of this host's loopback address. Raises NetError."""
    registry = CollectorRegistry()
    try:
        server = make_server(HOST, port, make_wsgi_app(registry), Server, Handler)
    except OSError as error:
        advice = "choose another with --set broker.metrics_port=PORT, or 0 for none"
        raise NetError(f"http://{HOST}:{port} cannot be used ({error.strerror}): {advice}") from None
    registry.register(DeploymentCollector(source.find))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
