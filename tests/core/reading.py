"""Telling events to cores, and reading what they say."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tetri.core.actions import Action, AddRequest, Free, Freed, Send


def sent(actions: Iterable[Action], peer: str | None = None, kind: type | None = None) -> list[Any]:
    """The messages sent, to one peer, of one kind."""
    messages = [a for a in actions if isinstance(a, Send) and peer in (None, a.peer)]
    return [a.message for a in messages if kind is None or isinstance(a.message, kind)]


def kinds(actions: Iterable[Action]) -> list[str]:
    """What each action is, in a word; of what is sent, the message and to whom."""
    return [f"{type(a.message).__name__} > {a.peer}" if isinstance(a, Send) else type(a).__name__ for a in actions]


def only(actions: Iterable[Action], kind: type) -> list[Any]:
    return [action for action in actions if isinstance(action, kind)]


def added(actions: Iterable[Action]) -> list[str]:
    """The keys of the engine requests that are added."""
    return [action.request.key for action in only(actions, AddRequest)]


class Told:
    """A core that is told events at a time that tests move on. `check()` after every one."""

    def __init__(self, core: Any) -> None:
        self.core, self.now = core, 0.0

    def tell(self, *events: Any) -> list[Action]:
        actions: list[Action] = []
        for event in events:
            actions += self._follow(self.core.handle(event, self.now))
            self.core.check()
        return actions

    def later(self, seconds: float = 0.0) -> list[Action]:
        """Time goes on, and the loop ticks."""
        self.now += seconds
        actions = self._follow(self.core.tick(self.now))
        self.core.check()
        return actions

    def _follow(self, actions: list[Action]) -> list[Action]:
        """What the executor does: the results of actions go back into the core after the last one."""
        results = [result for result in map(self.result, actions) if result is not None]
        followed = [self._follow(self.core.handle(result, self.now)) for result in results]
        return [*actions, *(action for each in followed for action in each)]

    def result(self, action: Action) -> Any:
        """The event that an action has at once, if any."""
        return Freed(len(action.handle.slots)) if isinstance(action, Free) else None
