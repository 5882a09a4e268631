import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tetri.bench.compare.awake import LATE_S, Awake


def children():
    """The processes that this one has started for it."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            stat = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            command = Path(f"/proc/{entry}/cmdline").read_text()
        except OSError:
            continue
        if int(stat[1]) == os.getpid() and "tetri.bench.compare.awake" in command:
            found.append(int(entry))
    return found


def noticed(awake, seconds=20.0):
    """What it notices, at once or soon."""
    end, found = time.monotonic() + seconds, []
    while not found and time.monotonic() < end:
        found = awake.standstills()
        time.sleep(0.01)
    return found


def test_a_process_on_each_cpu_as_long_as_it_is_entered():
    with Awake() as awake:
        pids = children()
        assert {*map(frozenset, map(os.sched_getaffinity, pids))} == {
            frozenset({cpu}) for cpu in os.sched_getaffinity(0)
        }
        policy = os.SCHED_FIFO if awake.real_time else os.SCHED_OTHER
        assert {*map(os.sched_getscheduler, pids)} == {policy}
    assert children() == []


@pytest.mark.parametrize("wanted", [True, False])
def test_a_standstill_is_noticed_once(wanted):
    with Awake(wanted) as awake:
        assert wanted or not awake.real_time
        (pid, *_) = children()
        awake.standstills()
        os.kill(pid, signal.SIGSTOP)
        time.sleep(LATE_S + 0.5)
        os.kill(pid, signal.SIGCONT)
        assert max(noticed(awake)) > LATE_S
    assert awake.standstills() == []


def test_it_only_watches_where_it_may_not_be_real_time():
    program = (
        "import os\ndef refuse(*_): raise PermissionError\nos.sched_setscheduler = refuse\n"
        "from tetri.bench.compare.awake import tick\ntick(min(os.sched_getaffinity(0)), True)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"watching\n"
        process.kill()


def test_it_ends_with_the_process_that_started_it():
    """Also when that is killed."""
    program = (
        "import os, sys, time\nfrom tetri.bench.compare.awake import Awake\n"
        "with Awake() as awake:\n print(*(each.pid for each in awake._processes), flush=True)\n time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        pids = process.stdout.readline().split()
        process.kill()
    end = time.monotonic() + 20
    while any(Path(f"/proc/{int(pid)}").exists() for pid in pids) and time.monotonic() < end:
        time.sleep(0.01)
    assert pids and not any(Path(f"/proc/{int(pid)}").exists() for pid in pids)
