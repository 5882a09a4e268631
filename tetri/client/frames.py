"""What a client puts into a frame and takes out of one: a version byte, then MessagePack of a tagged map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

from tetri.request import ROLES, Receipt, Sampling, Turn, Usage, sampling_problem

VERSION = b"\x02"
MAX_SENT = 4 << 20  # bytes: the broker drops a longer frame unread
MAX_RECEIVED = 16 << 20
MAX_NAME = 128  # characters; the broker drops a message with a longer one


class TetriError(Exception):
    """What went wrong with a request, in one line."""


class BadRequest(TetriError):
    """The request makes no sense; nothing was sent."""


class RequestRefused(TetriError):
    """The broker will not take the request. `retry_after_s`: when to try again, if that may help."""

    def __init__(self, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason if retry_after_s is None else f"{reason} (retry in {retry_after_s:g} s)")
        self.retry_after_s = retry_after_s


class Unreachable(TetriError):
    """No broker answers."""


class RequestFailed(TetriError):
    """The request was taken and failed; `result` is what it had produced."""

    def __init__(self, reason: str, result: Result) -> None:
        super().__init__(reason)
        self.result = result


@dataclass(frozen=True, slots=True)
class Result:
    """A finished request. `finish_reason`: stop, length, cancelled or deadline. `timeline`: seconds by stage,
    which add up to `jct_s`, the time from the broker's accepting to the end; `ttft_s` to the first token."""

    rid: str
    text: str
    token_ids: list[int]
    finish_reason: str
    usage: Usage
    timeline: dict[str, float]
    ttft_s: float | None
    jct_s: float
    receipt: Receipt

    def to_json(self) -> dict[str, Any]:
        """Plain values, ready for json.dumps."""
        plain = {name: getattr(self, name) for name in self.__slots__}
        for name in ("usage", "receipt"):
            record = plain[name]
            plain[name] = {field: getattr(record, field) for field in record.__struct_fields__}
        return plain


def submit(
    key: str,
    prompt: str | Sequence[int] | None,
    messages: Sequence[Turn | Mapping[str, str]] | None,
    deadline_s: float | None,
    sampling: Mapping[str, Any],
) -> bytes:
    """The Submit of one request. Raises BadRequest."""
    body: dict[str, Any] = {"type": "submit", "key": key, "sampling": _checked(sampling)}
    if (prompt is None) == (messages is None):
        raise BadRequest("give exactly one of prompt and messages")
    if messages is not None:
        if not isinstance(messages, Sequence) or isinstance(messages, str):
            raise BadRequest("messages must be a list of messages")
        body["messages"] = [_turn(message) for message in messages]
    elif isinstance(prompt, str):
        body["prompt"] = prompt
    elif isinstance(prompt, Sequence) and all(type(token) is int for token in prompt):
        body["prompt"] = list(prompt)
    else:
        raise BadRequest("prompt must be a text or a list of token ids")
    if deadline_s is not None:
        if not _is(deadline_s, float) or not _float("deadline_s", deadline_s) > 0:
            raise BadRequest(f"deadline_s must be a number of seconds above 0, got {deadline_s!r}")
        body["deadline_s"] = float(deadline_s)
    return frame(body)


def change_role(key: str, iid: str, role: str) -> bytes:
    """The ChangeRole that asks an instance to take new work as this role. Raises BadRequest."""
    if role not in ROLES:
        raise BadRequest(f"role must be {', '.join(ROLES[:-1])} or {ROLES[-1]}, got {role!r}")
    if not isinstance(iid, str) or not 0 < len(iid) <= MAX_NAME:
        raise BadRequest(f"an instance's name is a text of 1 to {MAX_NAME} characters")
    return frame({"type": "change_role", "key": key, "iid": iid, "role": role})


def frame(body: Mapping[str, Any]) -> bytes:
    """Raises BadRequest when the message cannot be sent."""
    try:
        data: bytes = VERSION + msgpack.packb(body)
    except (UnicodeEncodeError, OverflowError) as error:
        raise BadRequest(f"the request cannot be encoded: {error}") from None
    if len(data) > MAX_SENT:
        raise BadRequest(f"the request has {len(data)} bytes, at most {MAX_SENT} can be sent")
    return data


def _turn(message: Turn | Mapping[str, str]) -> dict[str, str]:
    if not isinstance(message, Turn | Mapping):
        raise BadRequest("a message has a role and a content: give a mapping or a Turn")
    found = {"role": message.role, "content": message.content} if isinstance(message, Turn) else dict(message)
    if set(found) != {"role", "content"} or not all(isinstance(value, str) for value in found.values()):
        raise BadRequest("a message has a role and a content, both texts, and nothing else")
    return found


_DEFAULTS = Sampling()
_KINDS = {name: type(getattr(_DEFAULTS, name)) for name in Sampling.__struct_fields__} | {"seed": int}


def _checked(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Wrong types are named here: a broker drops what it cannot read, and its client would wait in vain."""
    given = {name: value for name, value in sampling.items() if value is not None}
    if isinstance(given.get("stop"), str | tuple):
        given["stop"] = [given["stop"]] if isinstance(given["stop"], str) else list(given["stop"])
    for name, value in given.items():
        if name not in _KINDS:
            raise BadRequest(f"{name!r} is no sampling setting; known: {', '.join(Sampling.__struct_fields__)}")
        if not _is(value, _KINDS[name]):
            raise BadRequest(f"{name} must be {_KIND_NAMES[_KINDS[name]]}, got {value!r}")
        if _KINDS[name] is float:
            given[name] = _float(name, value)
    problem = sampling_problem(Sampling(**given))
    if problem:
        raise BadRequest(problem)
    return given


def _float(name: str, value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        raise BadRequest(f"{name} is far too large") from None


_KIND_NAMES = {int: "a whole number", float: "a number", bool: "true or false", list: "a list of texts"}


def _is(value: Any, kind: type) -> bool:
    if kind is list:
        return isinstance(value, list) and all(isinstance(text, str) for text in value)
    if kind is not bool and isinstance(value, bool):
        return False
    return isinstance(value, int | float if kind is float else kind)


_NUMBER = (int, float)
_MAYBE_NUMBER = (int, float, type(None))
_REPLIES: dict[str, dict[str, type | tuple[type, ...]]] = {
    "accepted": {"key": str, "rid": str, "prompt_tokens": int},
    "refused": {"key": str, "reason": str, "retry_after_s": _MAYBE_NUMBER},
    "delta": {"rid": str, "start": int, "ids": list, "text": str},
    "done": {
        **{"rid": str, "reason": str, "usage": dict, "timeline": dict, "ttft_s": _MAYBE_NUMBER},
        **{"jct_s": _NUMBER, "receipt": dict, "error": (str, type(None))},
    },
    "role_changed": {"key": str, "iid": str, "role": str, "was": str, "took_s": _NUMBER},
    "status": {"instances": list, "requests": dict, "counters": dict, "model": str, "monitor": (dict, type(None))},
}


def parse(data: bytes) -> dict[str, Any] | None:
    """The broker's reply in a frame; None when it is none that this client understands."""
    if data[:1] != VERSION:
        return None
    try:
        body = msgpack.unpackb(memoryview(data)[1:])
    except (ValueError, msgpack.UnpackException, RecursionError):
        return None
    tag = body.get("type") if isinstance(body, dict) else None
    kinds = _REPLIES.get(tag) if isinstance(tag, str) else None
    if kinds is None:
        return None
    reply = {name: body.get(name) for name in kinds}
    if not all(isinstance(reply[name], kind) for name, kind in kinds.items()):
        return None
    if not all(type(token) is int for token in reply.get("ids", ())):
        return None
    try:
        if tag == "done":
            reply["usage"], reply["receipt"] = Usage(**reply["usage"]), Receipt(**reply["receipt"])
            reply["usage"].completion_tokens + 0  # a number, or TypeError
    except TypeError:
        return None
    return {"type": tag, **reply}
