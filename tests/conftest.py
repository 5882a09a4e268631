"""What every test has: helper modules that can be imported (`import live`), groups of tests that share what is dear to
start, and a count of the engines that were started."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import starts
from groups import LONGEST, Shared, group

# Whoever runs the tests in the background may have these ignored; the programs under test would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_addoption(parser):
    text = "with -n: each process of pytest and all that it starts on a core of its own, in turn"
    parser.addoption("--core-each", action="store_true", help=text)


def pytest_configure(config):
    """Before any test module asks how many cores there are."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker and config.getoption("--core-each"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


# ---------------------------------------------------------------- groups


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With --dist loadfile a group stays together as a file's tests do. (xdist's own groups need an older pytest.)"""
    from xdist.scheduler import LoadFileScheduling

    class Grouped(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    return Grouped(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places: dict[str, int] = {}
    for item in items:
        places.setdefault(group(item.nodeid), len(places))
    places |= {name: number - len(LONGEST) for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places[group(item.nodeid)])


SHARED = pytest.StashKey[Shared]()


@pytest.fixture(scope="session")
def shared(pytestconfig: pytest.Config) -> Shared:
    return pytestconfig.stash.setdefault(SHARED, Shared())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    yield
    if SHARED in item.config.stash and (nextitem is None or group(nextitem.nodeid) != group(item.nodeid)):
        item.config.stash[SHARED].close()


# ---------------------------------------------------------------- engines that were started


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process of xdist tells the one that reports."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["engines"] = starts.engines


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    starts.engines += getattr(node, "workeroutput", {}).get("engines", 0)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if starts.engines:
        terminalreporter.write_line(f"vLLM engines started: {starts.engines}")
