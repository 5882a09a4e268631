"""Everything of ZeroMQ, and nothing that decides: sockets, locks, signals, the one loop of every process."""

from tetri.net.errors import NetError
from tetri.net.hub import Hub

__all__ = ["Hub", "NetError"]
