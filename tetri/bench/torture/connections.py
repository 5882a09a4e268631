"""Clients that use up the broker's descriptors."""

from __future__ import annotations

import resource
import socket
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from tetri.bench.report import BenchError
from tetri.bench.torture.case import Findings
from tetri.bench.torture.deployed import Deployed, deployed
from tetri.bench.torture.listener import Gaps, Listener
from tetri.client import Client

BASE_S = 2.0  # without the fault, to compare
FILES, CONNECTS = 256, 2000
HELD_S = 2.0  # how long the connections stay, while more arrive
WARNING = "no room for more connections"
WAIT_S = 20.0


def descriptors(folder: Path, found: Findings) -> None:
    """With a hard limit of 256 descriptors, 2,000 connects to the broker: it lives, open streams go on, and who waits
    is served when others have left."""
    with deployed(folder, found) as cluster, Listener(cluster.config) as listener:
        pid = cluster.pid("broker")
        gaps = Gaps(listener, found, lambda: time.sleep(BASE_S))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (FILES, FILES))
        with ExitStack() as kept:
            tried, entered = _burst(cluster, pid, kept)
            gaps.judge()
            most = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        start = time.monotonic()
        with Client(cluster.config.clients_address, timeout=WAIT_S) as client:
            client.generate([5] * 20, max_tokens=2)
        found.note("answered_after_s", round(time.monotonic() - start, 2))
        found.at_least("connects", tried, CONNECTS)
        found.note("connected", entered)
        found.at_most("open_files", most, FILES)
        found.at_least("refused_entry", cluster.log("broker").count(WARNING), 1)
        found.exactly("broker_died", cluster.pid("broker") != pid, False)


def _burst(cluster: Deployed, pid: int, kept: ExitStack) -> tuple[int, int]:
    """Connect without waiting, CONNECTS times and until nobody gets in any more; then hold on and try on. Returns how
    many were tried, and how many are connected. Raises BenchError if there is always room."""
    path = cluster.config.clients_address.removeprefix("ipc://")
    tried = entered = 0
    start, full_at = time.monotonic(), None
    while tried < CONNECTS or full_at is None or time.monotonic() < full_at + HELD_S:
        for _ in range(100):
            made = socket.socket(socket.AF_UNIX)
            made.setblocking(False)
            kept.callback(made.close)
            tried += 1
            with suppress(BlockingIOError, ConnectionRefusedError, FileNotFoundError):  # full, or nobody is there
                made.connect(path)
                entered += 1
                continue
            made.close()
        if not Path(f"/proc/{pid}").exists():
            raise BenchError(f"the broker died after {entered} connections")
        time.sleep(0.01)  # the broker's turn
        if full_at is None and WARNING in cluster.log("broker"):
            full_at = time.monotonic()
        if full_at is None and time.monotonic() > start + WAIT_S:
            raise BenchError(f"{entered} connections got in, and the broker has room for more")
    return tried, entered
