import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tetri.bench.compare.awake import LATE_S, Awake

REFUSING = (
    "import os\ndef refuse(*_): raise PermissionError\nos.sched_setscheduler = refuse\n"
    "from tetri.bench.compare.awake import tick\ntick(min(os.sched_getaffinity(0)))"
)


def children():
    """The processes that this one has started for it."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            stat = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            command = Path(f"/proc/{entry}/cmdline").read_text()
        except OSError:
            continue
        if int(stat[1]) == os.getpid() and stat[0] != "Z" and "tetri.bench.compare.awake" in command:
            found.append(int(entry))
    return found


def watchers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("awake")]


def test_it_watches_and_ticks_on_each_cpu_as_long_as_it_is_entered():
    cpus = {frozenset({cpu}) for cpu in os.sched_getaffinity(0)}
    with Awake() as awake:
        assert {frozenset(os.sched_getaffinity(thread.native_id)) for thread in watchers()} == cpus
        assert {os.sched_getscheduler(thread.native_id) for thread in watchers()} == {os.SCHED_OTHER}
        if awake.real_time:
            assert {frozenset(os.sched_getaffinity(pid)) for pid in children()} == cpus
            assert {*map(os.sched_getscheduler, children())} == {os.SCHED_FIFO}
    assert children() == [] == watchers()


def test_without_the_wish_it_only_watches():
    with Awake(False) as awake:
        assert not awake.real_time and children() == [] and watchers()


@pytest.mark.parametrize("wanted", [True, False])
def test_a_standstill_is_noticed(monkeypatch, wanted):
    """The clock jumps, as it does for a thread that was not run."""
    jump = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda clock=time.monotonic: clock() + jump[0])
    with Awake(wanted) as awake:
        awake.standstills()
        jump[0] = 100.0
        end, found = time.perf_counter() + 20, []
        while not found and time.perf_counter() < end:
            found = awake.standstills()
            time.sleep(0.01)
        assert 100 - LATE_S < found[0] < 120


def test_a_process_that_may_not_be_real_time_says_so_and_ends():
    done = subprocess.run([sys.executable, "-c", REFUSING], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "refused\n")


@pytest.mark.parametrize(
    ("setting", "real_time", "advice"),
    [("1\n", True, "sysctl kernel.sched_autogroup_enabled=0"), ("0\n", True, None), (None, True, None),
     ("0\n", False, "only root may have them"), ("1\n", False, "sysctl")],
)  # fmt: skip
def test_what_would_help_is_said(tmp_path, setting, real_time, advice):
    if setting is not None:
        (tmp_path / "autogroup").write_text(setting)
    found = Awake(real_time).advice(tmp_path / "autogroup")
    assert found is None if advice is None else advice in found


def test_it_ends_with_the_process_that_started_it():
    """Also when that is killed."""
    program = (
        "import time\nfrom tetri.bench.compare.awake import Awake\n"
        "with Awake() as awake:\n print(*(each.pid for each in awake._processes), flush=True)\n time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        pids = process.stdout.readline().split()
        process.kill()
    end = time.monotonic() + 20
    while any(Path(f"/proc/{int(pid)}").exists() for pid in pids) and time.monotonic() < end:
        time.sleep(0.01)
    assert pids and not any(Path(f"/proc/{int(pid)}").exists() for pid in pids)
