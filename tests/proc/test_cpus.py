"""What `cpus` means where not all CPUs are allowed, and the lines about too few of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from live import EMULATED, VLLM

from tetri.config import Config, load
from tetri.proc.cpus import check, chosen, few_threads, listed, pin, shortages
from tetri.strict import ConfigError


@pytest.fixture
def allow(monkeypatch):
    return lambda *cpus: monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*cpus})


def quota(folder: Path, cpus: float) -> Path:
    """A /proc/self of a process whose control group allows so many CPUs."""
    (folder / "cgroup").write_text("0::/\n")
    (folder / "mountinfo").write_text(f"30 22 0:9 / {folder} rw - cgroup2 x rw\n")
    (folder / "cpu.max").write_text(f"{int(100000 * cpus)} 100000\n")
    return folder


@pytest.mark.parametrize(
    ("allowed", "cpus", "found"),
    [
        ((4, 7), "+0", {4}),
        ((4, 7), "+1", {7}),
        ((4, 7), "+0-1", {4, 7}),
        ((4, 7), "+2", {4}),
        ((3,), "+1", {3}),
        ((4, 7), "7", {7}),
        ((4, 7), "", {4, 7}),
    ],
)
def test_plus_counts_the_allowed_cpus_and_a_bare_number_is_the_machines(allow, allowed, cpus, found) -> None:
    allow(*allowed)
    assert chosen(cpus) == found


def test_a_cpu_that_is_not_allowed_is_one_line_which_names_those_that_are(allow) -> None:
    allow(4, 5, 7)
    with pytest.raises(ConfigError, match=r"^cpus = '0-1': this process may use CPUs 4-5,7 only: choose") as caught:
        pin("0-1")
    assert "\n" not in str(caught.value)
    for place, setting in {"broker.cpus": "broker.cpus", "worker d0.cpus": "worker.d0.cpus"}.items():
        with pytest.raises(ConfigError, match=rf"^{place} = '6': "):
            check(load(VLLM, [f"{setting}=6"]))
    check(load(VLLM))


def test_a_process_is_pinned_to_one_of_those_that_it_inherits() -> None:
    """As a worker in a container, or behind taskset, whose CPUs have any numbers."""
    last = max(os.sched_getaffinity(0))
    program = "import os; from tetri.proc.cpus import pin; {}; pin('+1'); print(*os.sched_getaffinity(0))"
    program = program.format(f"os.sched_setaffinity(0, {{{last}}})")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == (f"{last}\n", 0), done.stderr


def test_a_list_of_cpus_for_people() -> None:
    assert [listed(cpus) for cpus in ([3], [0, 1], [0, 1, 2, 5, 8, 9])] == ["CPU 3", "CPUs 0-1", "CPUs 0-2,5,8-9"]


def told(config: Config, proc: Path = Path("/nowhere")) -> list[str]:
    return [*shortages(config, proc)]


def test_fewer_cpus_than_the_workers_are_meant_for_are_said(allow, tmp_path: Path) -> None:
    allow(2, 6)
    assert told(load(VLLM)) == []
    allow(6)
    assert told(load(VLLM)) == ["the workers are meant for 2 CPUs, and may use CPU 6 only: they slow each other down"]
    assert told(load(EMULATED)) == []


def test_a_quota_below_the_cpus_is_said(allow, tmp_path: Path) -> None:
    allow(*range(8))
    assert told(load(VLLM), quota(tmp_path, 2)) == [] and few_threads(quota(tmp_path, 8)) is None
    halt = "the control group allows 1.5 CPUs, and the workers use 2: when its time is used up, all of them halt"
    assert told(load(VLLM), quota(tmp_path, 1.5)) == [halt]
    assert told(load(EMULATED), quota(tmp_path, 2))[0].startswith("the control group allows 2.0 CPUs, and the workers")
    assert few_threads(tmp_path) == "its control group allows 2.0 CPUs of 8: it computes with 2 threads"
    assert few_threads(quota(tmp_path, 0.5)) == "its control group allows 0.5 CPUs of 8: it computes with 1 thread"
