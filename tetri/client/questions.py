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


class Question(Call[dict[str, Any]]):
    """Asks for one reply of the kind `answered`."""

    answered: type[Status | Readiness | Observation | Timeline | RoleChanged]

    def __init__(self, asked: bytes, name: str, patience: Patience, now: float) -> None:
        """`asked`: the frame. `name`: that of the reply, "" if such replies have none."""
        super().__init__(patience, now)
        self._frame, self._name = asked, name

    def question(self, now: float) -> bytes:
        return self._frame

    def names(self) -> tuple[str, ...]:
        return (self._name,)

    def receive(self, reply: BrokerReply, now: float) -> bool:
        if not isinstance(reply, self.answered):
            return False
        self.answer = msgspec.to_builtins(reply)
        del self.answer["type"]
        self.end()
        return True


class RefusableQuestion(Question):
    """Asks for what the broker may refuse. Raises RequestRefused."""

    def receive(self, reply: BrokerReply, now: float) -> bool:
        if isinstance(reply, Refused):
            self.end(RequestRefused(reply.reason))
            return True
        return super().receive(reply, now)


class Inspection(Question):
    """Asks for the cluster's Status."""

    answered = Status

    def __init__(self, patience: Patience, now: float) -> None:
        super().__init__(frame(Inspect()), "", patience, now)


class ReadinessCheck(Question):
    """Asks for the cluster's Readiness."""

    answered = Readiness

    def __init__(self, patience: Patience, now: float) -> None:
        super().__init__(frame(CheckReadiness()), "", patience, now)


class ObservationQuestion(Question):
    """Asks for an Observation: what has happened since the one before."""

    answered = Observation

    def __init__(self, epoch: int, since: int, patience: Patience, now: float) -> None:
        super().__init__(frame(Observe(epoch=epoch, since=since)), "", patience, now)


class Explanation(RefusableQuestion):
    """Asks for the Timeline of a choice."""

    answered = Timeline

    def __init__(self, rid: str, choice: int, patience: Patience, now: float) -> None:
        super().__init__(frame(Explain(rid=rid, choice=choice)), choice_id(rid, choice), patience, now)


class RoleQuestion(RefusableQuestion):
    """Changes the role of an instance; answered when the instance has its new role. Raises BadRequest."""

    answered = RoleChanged

    def __init__(self, key: str, iid: str, role: str, patience: Patience, now: float) -> None:
        super().__init__(change_role(key, iid, role), key, patience, now)
        self.doubt = f"is it up, and is {iid} not stuck?"

    def receive(self, reply: BrokerReply, now: float) -> bool:
        received = super().receive(reply, now)
        if self.answer is not None:
            self.answer.pop("key", None)
        return received
