"""The calls that are not completions: Cancel and Inspect, and those of operators, ChangeRole and EndRequest."""

from __future__ import annotations

from typing import Any

from tetri.client.conversation import Call, Patience
from tetri.client.frames import RequestRefused, change_role, frame


class Cancellation(Call[None]):
    """Ends a request: one of the client with this secret, or, for an operator, without a secret, of any client."""

    def __init__(self, rid: str, secret: str | None, patience: Patience, now: float) -> None:
        super().__init__(patience, now)
        self._rid = rid
        own = {"type": "end_request"} if secret is None else {"type": "cancel", "secret": secret}
        self._frame = frame({**own, "rid": rid})

    def question(self) -> bytes:
        return self._frame

    def names(self) -> tuple[str, ...]:
        return (self._rid,)

    def receive(self, reply: dict[str, Any], now: float) -> bool:
        if reply["type"] == "refused":
            self.end(RequestRefused(reply["reason"]))
        elif reply["type"] == "done":
            self.end()
        else:
            return False
        return True


class Inspection(Call[dict[str, Any]]):
    """Asks for the cluster's Status."""

    def question(self) -> bytes:
        return frame({"type": "inspect"})

    def names(self) -> tuple[str, ...]:
        return ("",)

    def receive(self, reply: dict[str, Any], now: float) -> bool:
        if reply["type"] == "status":
            self.answer = {name: value for name, value in reply.items() if name != "type"}
            self.end()
            return True
        return False


class RoleQuestion(Call[dict[str, Any]]):
    """Changes the role of an instance; answered when the instance has its new role. Raises BadRequest."""

    def __init__(self, key: str, iid: str, role: str, patience: Patience, now: float) -> None:
        super().__init__(patience, now)
        self.doubt = f"is it up, and is {iid} not stuck?"
        self._key, self._frame = key, change_role(key, iid, role)

    def question(self) -> bytes:
        return self._frame

    def names(self) -> tuple[str, ...]:
        return (self._key,)

    def receive(self, reply: dict[str, Any], now: float) -> bool:
        if reply["type"] == "refused":
            self.end(RequestRefused(reply["reason"]))
        elif reply["type"] == "role_changed":
            self.answer = {name: reply[name] for name in ("iid", "role", "was", "took_s")}
            self.end()
        else:
            return False
        return True
