"""The CPU quota of nested control groups of both versions, as /proc and /sys/fs/cgroup show them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tetri.control_groups import cpu_quota, folders, threads

V1 = {"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}


@pytest.fixture
def proc(tmp_path: Path):
    """Writes a /proc/self: the process's groups, and mounts as (root, folder of `tmp_path`, kind, options)."""

    def write(cgroup: str, *mounts: tuple[str, str, str, str]) -> Path:
        (tmp_path / "cgroup").write_text(cgroup)
        lines = ["22 1 0:21 / /proc rw,relatime shared:1 - proc proc rw", "23 1 0:22 / /mnt\udcff rw - tmpfs  rw"]
        lines += [f"30 22 0:9 {root} {tmp_path / at} rw shared:4 - {kind} x {more}" for root, at, kind, more in mounts]
        (tmp_path / "mountinfo").write_text("\n".join(lines) + "\n", errors="surrogateescape")
        return tmp_path

    return write


def put(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def test_the_smallest_quota_around_the_process_counts(proc, tmp_path: Path) -> None:
    at = proc("0::/a/b\n", ("/", "sys", "cgroup2", "rw"))
    put(tmp_path / "sys" / "a" / "b", **{"cpu.max": "max 100000\n"})
    put(tmp_path / "sys" / "a" / "b" / "other", **{"cpu.max": "1000 100000\n"})
    assert cpu_quota(at) is None
    put(tmp_path / "sys" / "a", **{"cpu.max": "250000 100000\n"})
    assert cpu_quota(at) == 2.5
    put(tmp_path / "sys" / "a" / "b", **{"cpu.max": "150000 50000\n"})
    assert cpu_quota(at) == 2.5
    put(tmp_path / "sys" / "a" / "b", **{"cpu.max": "50000 100000\n"})
    assert cpu_quota(at) == 0.5


def test_version_1_is_read_where_its_controller_is_mounted(proc, tmp_path: Path) -> None:
    mounts = [("/", at, "cgroup", f"rw,{at}") for at in ("memory", "cpu,cpuacct")]
    at = proc("5:memory:/m\n4:cpu,cpuacct:/a\n1:name=systemd:/s\n0::/\n", *mounts, ("/", "unified", "cgroup2", "rw"))
    put(tmp_path / "cpu,cpuacct", **V1)
    put(tmp_path / "cpu,cpuacct" / "a", **V1)
    assert cpu_quota(at) is None
    put(tmp_path / "cpu,cpuacct" / "a", **{"cpu.cfs_quota_us": "300000"})
    assert cpu_quota(at) == 3.0
    assert [*folders("memory", at)] == [tmp_path / "memory" / "m", tmp_path / "memory", tmp_path / "unified"]


@pytest.mark.parametrize("group", ["/docker/12", "/docker/12/inner", "/../host", "/docker/123"])
def test_a_container_sees_its_own_part_of_the_groups(proc, tmp_path: Path, group: str) -> None:
    at = proc(f"0::{group}\n", ("/docker/12", "sys", "cgroup2", "rw"))
    put(tmp_path / "sys", **{"cpu.max": "200000 100000\n"})
    put(tmp_path / "sys" / "inner", **{"cpu.max": "100000 100000\n"})
    put(tmp_path, **{"cpu.max": "1 100000\n"})
    assert cpu_quota(at) == (1.0 if group.endswith("inner") else 2.0)


def test_a_system_without_control_groups_has_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None


@pytest.mark.parametrize(
    ("quota", "count"), [("max", 8), ("1600000", 8), ("250000", 2), ("200000", 2), ("199000", 1), ("20000", 1)]
)
def test_threads_are_as_many_as_can_run_at_once(proc, tmp_path: Path, monkeypatch, quota: str, count: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 2, 3, 5, 8, 13, 21, 34})
    put(tmp_path / "sys", **{"cpu.max": f"{quota} 100000\n"})
    assert threads(proc("0::/\n", ("/", "sys", "cgroup2", "rw"))) == count
