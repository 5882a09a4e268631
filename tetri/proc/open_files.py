"""How many file descriptors each process needs, compared with the limit of this machine."""

from __future__ import annotations

from tetri.config import Config
from tetri.net import descriptors

LINK = 5  # descriptors of one peer: a socket and its connection, two ends of its monitor, the peer's own connection
FEED = 2  # of one worker in the monitor: its load reports, its subscription to the views
OWN = 64 + descriptors.RESERVE  # of a broker or monitor without peers
ENGINE = 128  # more in a worker: engine, slab, streams, libraries


def needed(config: Config, name: str) -> int:
    """How many descriptors the process `name` (broker, monitor, gateway, or a worker) may need."""
    workers = len(config.workers)
    if name == "gateway":
        return OWN + config.gateway.max_connections
    if name == "broker":
        return OWN + LINK * workers + config.broker.max_clients
    return OWN + FEED * workers if name == "monitor" else OWN + ENGINE + LINK * workers


def shortage(config: Config, name: str, limit: int) -> str | None:
    """One line that says why `limit` descriptors are too few for the process `name`; None when they are enough."""
    wanted = needed(config, name)
    if wanted <= limit:
        return None
    workers = f"{len(config.workers)} workers"
    peers = {
        "broker": f"{workers} and {config.broker.max_clients} clients (broker.max_clients)",
        "gateway": f"{config.gateway.max_connections} connections (gateway.max_connections)",
    }
    return (
        f"{name} may need {wanted} open files for {peers.get(name, workers)}, the hard limit is {limit}:"
        " raise it (ulimit -Hn), or connections will wait"
    )
