"""Makes the helper modules of this folder importable (`import live`) from every test below it."""

import os
import signal

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
