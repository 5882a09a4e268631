"""Processes that stop for longer than `dead_s`: a suspended laptop, a paused container."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from tetri.bench.overhead.measure import stopped
from tetri.bench.torture.case import Findings
from tetri.bench.torture.deployed import Deployed, deployed, workers
from tetri.bench.torture.load import Load

DEAD_S, FROZEN_S = 1.0, 3.0
LATE_S = 0.4 * DEAD_S  # so much later some go on: no worker is silent for too long
WORKERS = ("p0", "d0")
WIDTH, SETTLED = 8, 16  # requests that are open, and that end between two stops


def frozen(folder: Path, found: Findings) -> None:
    """Each process is stopped for three times `dead_s`, then all are, twice. Requests are open in every stage.

    A worker that stops alone is lost and its requests start over: nobody could know that it comes back. When the
    broker, the monitor or all stop, nobody is lost, since nobody was silent while the others listened."""
    settings = [workers(1, 1), f"cluster.dead_s={DEAD_S}"]
    with deployed(folder, found, settings) as cluster, Load(cluster.config, WIDTH) as load:
        load.wait(SETTLED)
        for name in ("broker", "monitor", *WORKERS):
            _stop(cluster, name, [name], (), load, found)
        _stop(cluster, "all_broker_first", ["broker"], ["monitor", *WORKERS], load, found)
        _stop(cluster, "all_workers_first", ["monitor", *WORKERS], ["broker"], load, found)
        load.finish()
        load.judge(found)


def _stop(
    cluster: Deployed, what: str, names: Sequence[str], later: Sequence[str], load: Load, found: Findings
) -> None:
    """Stop these processes. Those of `later` go on LATE_S after the others. Then as many requests must end again."""
    before = cluster.counter("workers_lost")
    first, last = ([cluster.pid(name) for name in each] for each in (names, later))
    with stopped(last):
        with stopped(first):
            time.sleep(FROZEN_S)
        time.sleep(LATE_S if later else 0.0)
    start = time.monotonic()
    load.wait(WIDTH + SETTLED)
    found.note(f"{what}_goes_on_s", round(time.monotonic() - start, 2))
    found.at_most(f"{what}_lost", cluster.counter("workers_lost") - before, int(what in WORKERS))
