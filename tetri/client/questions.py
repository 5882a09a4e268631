"""The calls that are not completions: Cancel, Inspect and CheckReadiness, and those of operators, ChangeRole and
EndRequest."""

from __future__ import annotations

from typing import Any

import msgspec

from tetri.client.conversation import Call, Patience
from tetri.client.frames import RequestRefused, change_role, frame
from tetri.wire.clients import (
    BrokerReply,
    Cancel,
    CheckReadiness,
    Done,
    EndRequest,
    Inspect,
    Readiness,
    Refused,
    RoleChanged,
    Status,
)


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
    answered: type[Status | Readiness] = Status

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


def _plain(reply: Status | Readiness | RoleChanged) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(reply)
    del plain["type"]
    return plain
