"""Virtual processes: each a real core with an inbox that is read between two turns of its loop, as in
tetri/net/loop.py, and what of tetri/proc/ stands around it. A worker's is in instance.py."""

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


class AnyCore(Protocol):
    def handle(self, event: Any, now: float) -> Sequence[Action]: ...

    def tick(self, now: float) -> Sequence[Action]: ...

    def deadline(self) -> float | None: ...

    def check(self) -> None: ...


class Node(ABC):
    """A process. What arrives at one moment is read in one turn; then comes `tick`, and the loop sleeps until
    something arrives or the core's deadline."""

    def __init__(self, kernel: Kernel, name: str, core: AnyCore) -> None:
        self.kernel, self.name, self.core = kernel, name, core
        self.inbox: list[Any] = []
        self._turn_set = False  # a turn comes at this very time
        self._alarm = inf  # when the loop wakes by itself

    @abstractmethod
    def carry_out(self, actions: Sequence[Action]) -> None: ...

    def receive(self, event: Any) -> None:
        self.inbox.append(event)
        if self._turn_set:
            return
        if self.kernel.more_now:  # more may arrive
            self._turn_set = True
            self.kernel.at(self.kernel.now, self._turn)
        else:
            self.turn()

    def start(self) -> None:
        self.turn()

    def _turn(self, _: Any) -> None:
        self._turn_set = False
        self.turn()

    def turn(self) -> None:
        now, core = self.kernel.now, self.core
        inbox = self.inbox
        if inbox:
            self.inbox = []
            for event in inbox:
                self.carry_out(core.handle(event, now))
        actions = core.tick(now)
        if actions:
            self.carry_out(actions)
        self.sleep()

    def sleep(self) -> None:
        deadline = self.core.deadline()
        if deadline is not None and deadline < self._alarm:
            self._alarm = max(deadline, self.kernel.now)
            self.kernel.at(self._alarm, self._wake, self._alarm)

    def _wake(self, alarm: float) -> None:
        if alarm == self._alarm:  # else an earlier one was set since
            self._alarm = inf
            if self.awake():
                self.turn()

    def awake(self) -> bool:
        """Whether the deadline has come; it may have moved since the alarm was set."""
        deadline = self.core.deadline()
        if deadline is not None and deadline > self.kernel.now:
            self.sleep()
        return deadline is not None and deadline <= self.kernel.now


class BrokerNode(Node):
    """The broker's process without text: every token is worth no character. `hear` is all clients: (client,
    message)."""

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
        for action in actions:
            result = self._table[type(action)](action)
            if result is not None:
                self.carry_out(self.core.handle(result, self.kernel.now))


class MonitorNode(Node):
    core: Monitor

    def __init__(self, kernel: Kernel, core: Monitor, port: Port) -> None:
        super().__init__(kernel, port.name, core)
        self.port = port
        self._table: dict[type[Any], Callable[[Any], None]] = {
            Send: lambda do: port.send(do.peer, do.message),
            Publish: lambda do: port.publish(do.message),
        }

    def carry_out(self, actions: Sequence[Action]) -> None:
        for action in actions:
            self._table[type(action)](action)
