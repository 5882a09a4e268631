"""Simulated processes: a live core with an inbox and an event loop like that of tetri/net/loop.py. Workers are in
instance.py."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from math import inf
from typing import Any, Protocol

from tetri.core.actions import Action, Connect, Detokenize, Detokenized, Disconnect, Publish, Release, Reply, Send
from tetri.core.broker.broker import Broker
from tetri.core.monitor import Monitor
from tetri.sim.kernel import Kernel
from tetri.sim.links import Port

ROUNDING_S = 1e-9  # more than the rounding error of a sum of times


class AnyCore(Protocol):
    """What the cores of the broker, the monitor and the workers have in common. Times are in seconds."""

    def handle(self, event: Any, now: float) -> Sequence[Action]:
        """Handle an event; return the actions to carry out."""
        ...

    def tick(self, now: float) -> Sequence[Action]:
        """Do what is due; return the actions to carry out."""
        ...

    def deadline(self) -> float | None:
        """Return when to call `tick` next, None if only an event makes that necessary."""
        ...

    def check(self) -> None:
        """Check the invariants. Raises AssertionError."""
        ...


class Node(ABC):
    """A process with a loop. One turn handles all events that arrive at the same time, then calls `tick` if it is due;
    the loop then sleeps until the next event or the core's deadline."""

    def __init__(self, kernel: Kernel, name: str, core: AnyCore) -> None:
        self.kernel, self.name, self.core = kernel, name, core
        self.inbox: list[Any] = []
        self._turn_set = False  # a turn is scheduled for the current time
        self._alarm = inf  # when the loop wakes up without an event
        self.lag_s = 0.0  # time that its clock has not counted (tetri.clock)

    @property
    def now(self) -> float:
        """The time of the process's own clock, in seconds."""
        return self.kernel.now - self.lag_s

    @abstractmethod
    def carry_out(self, actions: Sequence[Action]) -> None:
        """Carry out the core's actions."""

    def receive(self, event: Any) -> None:
        """Put an event into the inbox and let the loop handle it."""
        self.inbox.append(event)
        if self._turn_set:
            return
        if self.kernel.more_now:  # more events may arrive at this time
            self._turn_set = True
            self.kernel.at(self.kernel.now, self._turn)
        else:
            self.turn()

    def start(self) -> None:
        """Run the first turn."""
        self.turn()

    def _turn(self, _: Any) -> None:
        self._turn_set = False
        self.turn()

    def turn(self) -> None:
        """Run one turn of the loop."""
        now, core = self.kernel.now - self.lag_s, self.core
        inbox = self.inbox
        if inbox:
            self.inbox = []
            for event in inbox:
                actions = core.handle(event, now)
                if actions:
                    self.carry_out(actions)
        deadline = core.deadline()
        if deadline is not None and deadline <= now:
            actions = core.tick(now)
            if actions:
                self.carry_out(actions)
            deadline = core.deadline()
        self._sleep(deadline)

    def _sleep(self, deadline: float | None) -> None:
        """Schedule the next turn at the core's deadline, unless an earlier one is scheduled."""
        if deadline is None:
            return
        if self.lag_s:
            deadline += self.lag_s + ROUNDING_S
        if deadline < self._alarm:
            self._alarm = max(deadline, self.kernel.now)
            self.kernel.at(self._alarm, self._wake, self._alarm)

    def _wake(self, alarm: float) -> None:
        if alarm == self._alarm:  # else an earlier alarm has replaced this one
            self._alarm = inf
            if self.awake():
                self.turn()

    def awake(self) -> bool:
        """Whether the loop runs now."""
        return True


class BrokerNode(Node):
    """The broker's process, without detokenization: all text is empty. `receive_reply(client, message)` takes the
    replies for all clients."""

    core: Broker

    def __init__(self, kernel: Kernel, core: Broker, port: Port, receive_reply: Callable[[bytes, Any], Any]) -> None:
        super().__init__(kernel, port.name, core)
        self.port = port
        self._table: dict[type[Any], Callable[[Any], Any]] = {
            Send: lambda do: port.send(do.peer, do.message),
            Reply: lambda do: receive_reply(do.client, do.message),
            Detokenize: lambda do: Detokenized(do.rid, do.start, do.ids, "", None, do.final),
            Release: lambda do: None,
            Connect: lambda do: port.connect(do.peer, do.address),
            Disconnect: lambda do: port.disconnect(do.peer),
        }

    def carry_out(self, actions: Sequence[Action]) -> None:
        """Carry out the core's actions and let the core handle their results."""
        for action in actions:
            result = self._table[type(action)](action)
            if result is not None:
                self.carry_out(self.core.handle(result, self.now))


class MonitorNode(Node):
    """The monitor's process."""

    core: Monitor

    def __init__(self, kernel: Kernel, core: Monitor, port: Port) -> None:
        super().__init__(kernel, port.name, core)
        self.port = port
        self._table: dict[type[Any], Callable[[Any], None]] = {
            Send: lambda do: port.send(do.peer, do.message),
            Publish: lambda do: port.publish(do.message),
        }

    def carry_out(self, actions: Sequence[Action]) -> None:
        """Carry out the core's actions."""
        for action in actions:
            self._table[type(action)](action)
