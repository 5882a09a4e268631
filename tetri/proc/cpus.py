"""The CPUs of a process: which it runs on, and a line for people where there are fewer than the configuration wants."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from tetri import control_groups
from tetri.config import Config, cpu_numbers
from tetri.strict import ConfigError


def chosen(cpus: str, place: str = "cpus") -> set[int]:
    """The CPUs that a `cpus` value selects among those that this process may use; "" selects all. "+N" is number N of
    these, counted again from the first after the last. Raises ConfigError, which names the setting `place`."""
    allowed, wanted = sorted(os.sched_getaffinity(0)), cpu_numbers(cpus)
    if cpus.startswith("+"):
        return {allowed[number % len(allowed)] for number in wanted}
    if not wanted <= {*allowed}:
        advice = 'choose from these, or "+0" for the first of them, "+1" for the second'
        raise ConfigError(f"{place} = {cpus!r}: this process may use {listed(allowed)} only: {advice}")
    return {*wanted} or {*allowed}


def check(config: Config) -> None:
    """Raises ConfigError if the configuration names a CPU that a process which is started here may not use."""
    for name, part in (("broker", config.broker), ("gateway", config.gateway), ("monitor", config.monitor)):
        chosen(part.cpus, f"{name}.cpus")
    for worker in config.workers:
        chosen(worker.cpus, f"worker {worker.iid}.cpus")


def pin(cpus: str) -> None:
    """Keep this process on its CPUs, before any library counts them. Raises ConfigError."""
    if not cpus:
        return
    try:
        os.sched_setaffinity(0, chosen(cpus))
    except OSError as error:
        raise ConfigError(f"cpus = {cpus!r}: this process cannot be kept on them: {error.strerror}") from None


def listed(cpus: list[int]) -> str:
    """Ascending CPU numbers for people: CPUs 0-3,6."""
    parts: list[list[int]] = []
    for cpu in cpus:
        if parts and cpu == parts[-1][-1] + 1:
            parts[-1].append(cpu)
        else:
            parts.append([cpu])
    ranges = ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
    return f"CPU{'s' if len(cpus) > 1 else ''} {ranges}"


def few_threads(proc: Path = control_groups.PROC) -> str | None:
    """One line if the control groups allow this process less than its CPUs; else None."""
    cpus, quota = len(os.sched_getaffinity(0)), control_groups.cpu_quota(proc)
    if quota is None or quota >= cpus:
        return None
    count = control_groups.threads(proc)
    return f"its control group allows {quota:.1f} CPUs of {cpus}: it computes with {count} thread{'s' * (count > 1)}"


def shortages(config: Config, proc: Path = control_groups.PROC) -> Iterator[str]:
    """A line each for fewer CPUs, and for less of their time, than the workers are meant for. Raises ConfigError."""
    allowed = sorted(os.sched_getaffinity(0))
    counted = {number + 1 for w in config.workers if w.cpus.startswith("+") for number in cpu_numbers(w.cpus)}
    if (most := max(counted, default=0)) > len(allowed):
        yield f"the workers are meant for {most} CPUs, and may use {listed(allowed)} only: they slow each other down"
    used, quota = set().union(*(chosen(worker.cpus) for worker in config.workers)), control_groups.cpu_quota(proc)
    if quota is not None and quota < len(used):
        yield (
            f"the control group allows {quota:.1f} CPUs, and the workers use {len(used)}: when its time is used up, all"
            " of them halt"
        )
