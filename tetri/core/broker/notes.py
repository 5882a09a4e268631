"""What a Status says about a degraded cluster: one line for each thing that works worse than it should."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from tetri.request import StepRatio
from tetri.wire.clients import InstanceStatus, MonitorStatus

MONITOR_SILENT_S = 5.0  # age of the newest cluster view from which the monitor counts as silent
MOST_OFF = 1.5  # a cost table that is wrong by a larger factor, in either direction, gets a line
_UNSENT, _INVALID = "unsent_full_", "garbage_"
NO_MONITOR = "requests are placed without load reports, and no instance flips by itself"


def notes(
    instances: Iterable[InstanceStatus], monitor: MonitorStatus | None, unreadable: Mapping[str, str]
) -> list[str]:
    """One line, for people, about each degraded mode of the cluster. `unreadable`: prefill instances whose KV no decode
    instance could read, and why."""
    silent = "since the broker's start" if monitor is None else f"for {monitor.age_s:.1f} s"
    quiet = monitor is None or monitor.age_s >= MONITOR_SILENT_S
    lines = [f"the monitor is silent {silent}: {NO_MONITOR}"] if quiet else []
    known = [*instances]
    lines += [line for instance in known for line in _of_instance(instance)]
    lines += [f"{iid} gets few requests, since its KV cannot be read: {why}" for iid, why in unreadable.items()]
    return [*lines, *_of_transfers(known)]


def of_counters(who: str, counters: dict[str, int]) -> Iterator[str]:
    """About the counters of one process, by name."""
    for name, count in counters.items():
        if name.startswith(_UNSENT) and count:
            yield f"{who} could not send {count} messages to {name.removeprefix(_UNSENT)}, whose queue was full"
        elif _INVALID in name and count:
            yield f"{who} dropped {count} invalid messages ({name})"


def _of_instance(instance: InstanceStatus) -> Iterator[str]:
    iid, predictor = instance.iid, instance.predictor
    if instance.state == "lost":
        yield f"{iid} is lost: {instance.note or 'not connected yet'}"
    elif instance.note:
        alone = "exchanges KV with no other instance: " if _is_incompatible(instance) and not instance.paths else ""
        yield f"{iid}: {alone}{instance.note}"
    if predictor is not None and predictor.kind != "prior" and not predictor.on:
        yield f"{iid} predicts lengths by the prior alone: {predictor.note}"
    if instance.state != "lost":
        yield from _of_step_times(iid, instance.step_ratio)
    yield from of_counters(iid, instance.counters)


def _of_step_times(iid: str, ratio: StepRatio) -> Iterator[str]:
    """About a cost table that is wrong on this machine, in either direction."""
    for phase, found in (("prefill", ratio.prefill), ("decode", ratio.decode)):
        if found is not None and not 1 / MOST_OFF <= found <= MOST_OFF:
            off = f"{iid}: {phase} steps take {found:.2f} times as long as its cost table (engine.cost) predicts"
            yield f"{off}; predictions are corrected. It is of another machine, or this one has other work"


def _of_transfers(instances: list[InstanceStatus]) -> Iterator[str]:
    """About KV that cannot be read. An instance that can read no other's is named once, and not for each of these."""
    live = [instance for instance in instances if instance.state != "lost"]
    bad = {instance.iid: instance.load.unread for instance in live if instance.load.unread}
    for iid, count in bad.items():
        yield f"{iid} cannot read KV: its last {count} transfers, from several instances, failed; it gets few requests"
    for instance in live:
        for peer, why in instance.unread_by.items():
            if peer not in bad:
                failed = instance.counters.get(f"unread_{peer}", 0)
                what = f"{peer} cannot read KV of {instance.iid}, which sends it little"
                yield f"{what}: {why} ({failed} transfers failed)"


def _is_incompatible(instance: InstanceStatus) -> bool:
    return instance.note.startswith("never paired")
