"""The control groups that bound this process (versions 1 and 2), and how many threads their CPU quota leaves it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc/self")


def folders(controller: str, proc: Path = PROC) -> Iterator[Path]:
    """The folders of the control groups that bound this process for `controller` ("cpu", "memory"): its own, then each
    one around it that can be seen from here."""
    lines = [line.split(":", 2) for line in read(proc / "cgroup").splitlines()]
    groups = {name: group for _, names, group in lines for name in names.split(",")}  # "" is version 2
    for line in read(proc / "mountinfo").splitlines():
        mounted, _, what = line.partition(" - ")
        root, mount = mounted.split()[3:5]
        kind, _, options = what.split(" ", 2)  # the device may have no name
        name = "" if kind == "cgroup2" else controller
        if kind not in ("cgroup", "cgroup2") or name not in groups or name not in ("", *options.split(",")):
            continue
        # In a container the group's path may be the host's, of which the container sees its own part or nothing.
        inside = groups[name].removeprefix(root).strip("/") if groups[name].startswith(root) else ""
        folder = Path(mount, inside)
        yield from (each for each in (folder, *folder.parents) if each.is_relative_to(mount))


def cpu_quota(proc: Path = PROC) -> float | None:
    """How many CPUs' time the control groups allow; None without a limit."""
    found = []
    for folder in folders("cpu", proc):
        names = ("cpu.max",) if (folder / "cpu.max").exists() else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        values = " ".join(read(folder / name) for name in names).split()
        if len(values) == 2 and all(map(str.isdecimal, values)):  # no limit is "max" or "-1"
            found.append(int(values[0]) / int(values[1]))
    return min(found, default=None)


def threads(proc: Path = PROC) -> int:
    """How many threads of this process can compute at the same time: one for each CPU that it may use, and not more
    than its control groups have time for, or all would be halted together in each period."""
    cpus, quota = len(os.sched_getaffinity(0)), cpu_quota(proc)
    return cpus if quota is None else min(cpus, max(1, int(quota)))


def read(path: Path) -> str:
    """The text of a file of the kernel; "" where there is none: the system or its control groups differ."""
    try:
        return os.fsdecode(path.read_bytes()).strip()  # mounts may have any name
    except OSError:
        return ""
