"""The event loop of every process: wait for events or the core's deadline, and carry out the core's actions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import inf
from typing import Protocol, TypeVar

Event_contra = TypeVar("Event_contra", contravariant=True)
Action_co = TypeVar("Action_co", covariant=True)
Event = TypeVar("Event")
Action = TypeVar("Action")


class Time(Protocol):
    """The clock of a process (tetri.clock.Clock)."""

    def now(self) -> float:
        """The current time in seconds."""

    def listen(self, seconds: float) -> None:
        """Record that the process now waits for so many seconds: waking up much later is no silence of others."""


class Core(Protocol[Event_contra, Action_co]):
    """Turns events into actions and does no I/O. Times are seconds of the loop's clock."""

    def handle(self, event: Event_contra, now: float) -> Sequence[Action_co]:
        """Handle one event; returns the actions to carry out, in order."""

    def tick(self, now: float) -> Sequence[Action_co]:
        """Handle the timers that are due; returns the actions to carry out, in order."""

    def deadline(self) -> float | None:
        """When `tick` has a timer to handle next; None: no timer is set."""


def run(
    core: Core[Event, Action],
    poll: Callable[[float | None], Iterable[Event]],
    act: Callable[[Sequence[Action]], None],
    clock: Time,
    running: Callable[[], bool],
) -> None:
    """Run the loop until `running()` is False. `poll(timeout)` waits at most `timeout` seconds (None: no limit) and
    returns the events; `timeout` is 0 when the deadline has passed.

    The loop calls `tick` after every poll, also when events arrived: traffic must not delay timers.
    """
    while running():
        deadline = core.deadline()
        timeout = None if deadline is None else max(0.0, deadline - clock.now())
        clock.listen(inf if timeout is None else timeout)
        for event in poll(timeout):
            act(core.handle(event, clock.now()))
        act(core.tick(clock.now()))
