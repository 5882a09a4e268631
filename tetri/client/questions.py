"""The calls that are not completions: Cancel, Inspect, CheckReadiness, Observe and Explain, and those of operators,
ChangeRole and EndRequest."""

from __future__ import annotations

from typing import Any

import msgspec

from tetri.client.conversation import Call, Patience
from tetri.client.frames import RequestRefused, change_role, frame
from tetri.request import choice_id
from tetri.wire.clients import (
    BrokerReply,
    Cancel,
    CheckReadiness,
    Done,
    EndRequest,
    Explain,
    Inspect,
    Observation,
    Observe,
    Readiness,
    Refused,
    RoleChanged,
    Status,
)
from tetri.wire.observation import Timeline


class Cancellation(Call[None]):
    """Ends a request: one of the client with this secret, or, for an operator, without a secret, of any client."""

    def __init__(self, rid: str, secret: str | None, patience: Patience, now: float) -> None:
        super().__init__(patience, now)
        self._rid = rid
        self._frame = frame(EndRequest(rid=rid) if secret is None else Cancel(rid=rid, secret=secret))

    def question(self, now: float) -> bytes:
        return self._frame

    def names(self) -> tuple[str, ...]:
        return (self._rid,)

    def receive(self, reply: BrokerReply, now: float) -> bool:
        if isinstance(reply, Refused):
            self.end(RequestRefused(reply.reason))
        elif isinstance(reply, Done):
            self.end()
        else:
            return False
        return True


class Inspection(Call[dict[str, Any]]):
    """Asks for the cluster's Status."""

    asked: type[Inspect | CheckReadiness] = Inspect
    answered: type[Status | Readiness | Observation] = Status

    def question(self, now: float) -> bytes:
        return frame(self.asked())

    def names(self) -> tuple[str, ...]:
        return ("",)

    def receive(self, reply: BrokerReply, now: float) -> bool:
        if isinstance(reply, self.answered):
            self.answer = _plain(reply)
            self.end()
            return True
        return False


class ReadinessCheck(Inspection):
    """Asks for the cluster's Readiness."""

    asked, answered = CheckReadiness, Readiness


class Look(Inspection):
    """Asks for an Observation: what has happened since the one before."""

    answered = Observation

    def __init__(self, epoch: int, since: int, patience: Patience, now: float) -> None:
        super().__init__(patience, now)
        self._frame = frame(Observe(epoch=epoch, since=since))

    def question(self, now: float) -> bytes:
        return self._frame


class Explanation(Call[dict[str, Any]]):
    """Asks for the Timeline of a choice. Raises RequestRefused if the broker knows nothing of it."""

    def __init__(self, rid: str, choice: int, patience: Patience, now: float) -> None:
        super().__init__(patience, now)
        self._name = choice_id(rid, choice)
        self._frame = frame(Explain(rid=rid, choice=choice))

    def question(self, now: float) -> bytes:
        return self._frame

    def names(self) -> tuple[str, ...]:
        return (self._name,)

    def receive(self, reply: BrokerReply, now: float) -> bool:
        if isinstance(reply, Refused):
            self.end(RequestRefused(reply.reason))
        elif isinstance(reply, Timeline):
            self.answer = _plain(reply)
            self.end()
        else:
            return False
        return True


class RoleQuestion(Call[dict[str, Any]]):
    """Changes the role of an instance; answered when the instance has its new role. Raises BadRequest."""

    def __init__(self, key: str, iid: str, role: str, patience: Patience, now: float) -> None:
        super().__init__(patience, now)
        self.doubt = f"is it up, and is {iid} not stuck?"
        self._key, self._frame = key, change_role(key, iid, role)

    def question(self, now: float) -> bytes:
        return self._frame

    def names(self) -> tuple[str, ...]:
        return (self._key,)

    def receive(self, reply: BrokerReply, now: float) -> bool:
        if isinstance(reply, Refused):
            self.end(RequestRefused(reply.reason))
        elif isinstance(reply, RoleChanged):
            self.answer = _plain(reply)
            del self.answer["key"]
            self.end()
        else:
            return False
        return True


def _plain(reply: Status | Readiness | Observation | Timeline | RoleChanged) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(reply)
    del plain["type"]
    return plain
