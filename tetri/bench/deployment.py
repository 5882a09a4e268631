"""Start a separate deployment for one benchmark and remove everything of it afterwards."""

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
from tetri.proc.supervise import LaunchError, Supervisor
from tetri.request import Receipt
from tetri.strict import ConfigError

EXPECTED = (ConfigError, LaunchError, ModelError, TetriError)  # their text is one line
REPOSITORY = Path(__file__).parents[2]
EMULATED = REPOSITORY / "conf" / "emulated.toml"
SPLIT = REPOSITORY / "conf" / "split.toml"  # a prefill and a decode worker with a model
START_S = 60.0  # timeout for the start of emulated engines
LOAD_S = 600.0  # for real engines; two take half a minute on an idle machine
T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def own_folder(name: str, keep: bool = False) -> Iterator[Path]:
    """Create a run directory and remove it at the end, unless `keep`. From now on SIGTERM and SIGHUP act like Ctrl-C,
    so that the deployment is stopped."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if _may_set() and signal.getsignal(number) is not signal.SIG_IGN:  # ignored under nohup
            signal.signal(number, signal.default_int_handler)
    folder = Path(tempfile.mkdtemp(prefix=f"tetri-{name}-{os.getpid()}-", dir="/tmp"))  # Unix sockets need a short path
    try:
        yield folder
    finally:
        if keep:
            progress(f"logs are in {folder}/log")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def configured(conf: Path, folder: Path, name: str, settings: Sequence[str]) -> Config:
    """Load a configuration with its own run directory and name, and without HTTP, so that it can run beside other
    deployments. `settings` are "section.key=value". Raises ConfigError."""
    own = [f"cluster.run_dir={folder}", f"cluster.name={name}-{os.getpid()}", "gateway.count=0"]
    return load(conf, [*own, *settings])


def pinned(conf: Path, folder: Path, name: str, cpus: Sequence[int], more: Sequence[str] = ()) -> Config:
    """As `configured`, with the broker and prefill workers on the first of `cpus`, decode workers on the last, and
    those that do both on each in turn. `more` are further settings."""
    own = ["broker.clients="]
    pins = [f"broker.cpus={cpus[0]}"]
    for number, worker in enumerate(configured(conf, folder, name, own).workers):
        place = {"prefill": 0, "decode": -1}.get(worker.role, number % len(cpus))
        pins.append(f"worker.{worker.iid}.cpus={cpus[place]}")
    if len(cpus) == 1:
        progress(f"one CPU only: all workers share CPU {cpus[0]}")
    return configured(conf, folder, name, [*own, *pins, *more])


@contextmanager
def running(config: Config, progress: Progress, wait_s: float) -> Iterator[Path]:
    """Start the deployment, yield its run directory and stop the deployment at the end. Signals are ignored while it
    stops, so that a second Ctrl-C leaves nothing running. Raises LaunchError and ModelError."""
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
    """Call `read` every `every_s` seconds until its result is `enough` or `seconds` have passed; return the result."""
    end = time.monotonic() + seconds
    while not enough(found := read()) and time.monotonic() <= end:
        time.sleep(every_s)
    return found


def segments(config: Config) -> list[str]:
    """Return the names of the cluster's shared memory segments."""
    return [name for name in os.listdir("/dev/shm") if name.startswith(f"tetri-{config.cluster.name}-")]


def after_the_end(config: Config) -> list[str]:
    """Return the processes, sockets and segments that remain of a stopped cluster."""
    found = [f"process {pid}" for pid in Supervisor(config.run_dir).alive()]
    found += [f"socket {path.name}" for path in config.run_dir.iterdir() if path.is_socket()]
    return found + [f"segment {name}" for name in segments(config)]


def logged(config: Config) -> str:
    """Return the text of all logs."""
    return "".join(path.read_text(errors="replace") for path in sorted((config.run_dir / "log").glob("*.log*")))


def check_straight(receipt: Receipt) -> None:
    """Raise BenchError if the request was restarted, preempted or recomputed: its times must not count."""
    if receipt.recomputed or receipt.preempted or receipt.attempts > 1:
        raise BenchError(f"a request was restarted, preempted or recomputed, so its times do not count: {receipt}")
