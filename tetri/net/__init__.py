"""Network and process plumbing: ZeroMQ sockets, lock files, signals, and the event loop. No decisions are made here."""

from tetri.net.errors import NetError
from tetri.net.hub import Hub

__all__ = ["Hub", "NetError"]
