"""A deployment of its own for one benchmark: nothing else uses it, and nothing of it is left."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from tetri.bench.report import BenchError, Progress, progress
from tetri.client import TetriError
from tetri.config import Config, load
from tetri.models import ModelError
from tetri.proc import launch
from tetri.proc.supervise import LaunchError
from tetri.request import Receipt
from tetri.strict import ConfigError

EXPECTED = (ConfigError, LaunchError, ModelError, TetriError)  # each of them is one line
REPOSITORY = Path(__file__).parents[2]
EMULATED = REPOSITORY / "conf" / "emulated.toml"
START_S = 60.0  # until emulated engines are there
LOAD_S = 600.0  # two real engines take half a minute on a quiet machine
T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def own_folder(name: str, keep: bool = False) -> Iterator[Path]:
    """A run directory, removed at the end unless it is to be kept. SIGTERM and SIGHUP act as Ctrl-C does from now
    on: what was started is stopped again."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if _may_set() and signal.getsignal(number) is not signal.SIG_IGN:  # under nohup it goes on
            signal.signal(number, signal.default_int_handler)
    folder = Path(tempfile.mkdtemp(prefix=f"tetri-{name}-{os.getpid()}-", dir="/tmp"))  # Unix sockets: a short path
    try:
        yield folder
    finally:
        if keep:
            progress(f"logs are in {folder}/log")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def configured(conf: Path, folder: Path, name: str, settings: Sequence[str]) -> Config:
    """The file with a run directory and a name of its own, so that it may run beside any other deployment. `settings`
    are "section.key=value". Raises ConfigError."""
    return load(conf, [f"cluster.run_dir={folder}", f"cluster.name={name}-{os.getpid()}", *settings])


def pinned(conf: Path, folder: Path, name: str, cpus: Sequence[int], more: Sequence[str] = ()) -> Config:
    """As `configured`, prefill workers and the broker on the first of `cpus`, decode workers on the last."""
    own = ["broker.clients="]
    pins = [f"broker.cpus={cpus[0]}"]
    for worker in configured(conf, folder, name, own).workers:
        pins.append(f"worker.{worker.iid}.cpus={cpus[0] if worker.role == 'prefill' else cpus[-1]}")
    if len(cpus) == 1:
        progress(f"one CPU only: prefill and decode share CPU {cpus[0]}")
    return configured(conf, folder, name, [*own, *pins, *more])


@contextmanager
def running(config: Config, progress: Progress, wait_s: float) -> Iterator[Path]:
    """The run directory of the deployment, which runs until the end of this context. A second Ctrl-C must not leave
    half of it running. Raises LaunchError and ModelError."""
    try:
        yield launch.up(config, progress, wait_s)
    finally:
        before = {number: signal.getsignal(number) for number in SIGNALS if _may_set()}
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        try:
            launch.down(config.run_dir)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _may_set() -> bool:
    return threading.current_thread() is threading.main_thread()


def polled(read: Callable[[], T], enough: Callable[[T], bool], seconds: float, every_s: float) -> T:
    """What was read last: that which is enough, or after `seconds` that which is not."""
    end = time.monotonic() + seconds
    while not enough(found := read()) and time.monotonic() <= end:
        time.sleep(every_s)
    return found


def check_straight(receipt: Receipt) -> None:
    """Raises BenchError when a request met a fault or lack of memory: its times say nothing of the others'."""
    if receipt.recomputed or receipt.preempted or receipt.attempts > 1:
        raise BenchError(f"a request did not go the straight way, so its times do not count: {receipt}")
