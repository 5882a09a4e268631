"""The one loop of every process: wait for what happens or for the core's deadline, do what the core says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

Event_contra = TypeVar("Event_contra", contravariant=True)
Action_co = TypeVar("Action_co", covariant=True)
Event = TypeVar("Event")
Action = TypeVar("Action")


class Core(Protocol[Event_contra, Action_co]):
    """Decides, and does nothing itself. `now` and deadlines are seconds of the loop's clock."""

    def handle(self, event: Event_contra, now: float) -> Sequence[Action_co]: ...

    def tick(self, now: float) -> Sequence[Action_co]: ...

    def deadline(self) -> float | None: ...


def run(
    core: Core[Event, Action],
    poll: Callable[[float | None], Iterable[Event]],
    act: Callable[[Sequence[Action]], None],
    clock: Callable[[], float],
    running: Callable[[], bool],
) -> None:
    """Until `running()` is False. `poll(timeout)` waits at most `timeout` seconds (None: for ever) and is
    told 0 when the deadline has passed, so nothing here sleeps and nothing spins.

    `tick` comes after every poll, whether something arrived or not: traffic must not hold timers up.
    """
    while running():
        for event in poll(_wait(core.deadline(), clock)):
            act(core.handle(event, clock()))
        act(core.tick(clock()))


def _wait(deadline: float | None, clock: Callable[[], float]) -> float | None:
    return None if deadline is None else max(0.0, deadline - clock())
