"""Encode and decode the client's frames: a version byte, then a tagged map in MessagePack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

from tetri.request import ROLES, AskedSampling, Receipt, Turn, Usage, sampling_problem

VERSION = b"\x03"
MAX_SENT = 4 << 20  # bytes; the broker drops longer frames
MAX_RECEIVED = 16 << 20
MAX_NAME = 128  # characters; the broker drops messages with longer names


class TetriError(Exception):
    """Base of all errors of this library; its text is one line."""


class BadRequest(TetriError):
    """The request is invalid; it was not sent."""


class RequestRefused(TetriError):
    """The broker refused the request. `retry_after_s`: when a retry may succeed; None if it will not."""

    def __init__(self, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason if retry_after_s is None else f"{reason} (retry in {retry_after_s:g} s)")
        self.retry_after_s = retry_after_s


class Unreachable(TetriError):
    """The broker does not answer."""


class RequestFailed(TetriError):
    """An accepted request failed. `result` has the output so far."""

    def __init__(self, reason: str, result: Result) -> None:
        super().__init__(reason)
        self.result = result


@dataclass(frozen=True, slots=True)
class Result:
    """A finished request. `finish_reason`: stop, length, cancelled or deadline. `timeline`: seconds in each stage; they
    add up to `jct_s`, the time from the broker's Accepted to the end. `ttft_s`: time to the first token, None without
    one."""

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
        """Return the result as plain values for json.dumps."""
        plain = {name: getattr(self, name) for name in self.__slots__}
        for name in ("usage", "receipt"):
            record = plain[name]
            plain[name] = {field: getattr(record, field) for field in record.__struct_fields__}
        return plain


def submit(
    key: str,
    secret: str,
    prompt: str | Sequence[int] | None,
    messages: Sequence[Turn | Mapping[str, str]] | None,
    deadline_s: float | None,
    sampling: Mapping[str, Any],
) -> bytes:
    """Return the Submit frame of one request. Raises BadRequest."""
    body: dict[str, Any] = {"type": "submit", "key": key, "secret": secret, "sampling": _checked(sampling)}
    if (prompt is None) == (messages is None):
        raise BadRequest("give exactly one of prompt and messages")
    if messages is not None:
        if not isinstance(messages, Sequence) or isinstance(messages, str):
            raise BadRequest("messages must be a list")
        body["messages"] = [_turn(message) for message in messages]
    elif isinstance(prompt, str):
        body["prompt"] = prompt
    elif isinstance(prompt, Sequence) and all(type(token) is int for token in prompt):
        body["prompt"] = list(prompt)
    else:
        raise BadRequest("prompt must be a string or a list of token ids")
    if deadline_s is not None:
        if not _is(deadline_s, float) or not _float("deadline_s", deadline_s) > 0:
            raise BadRequest(f"deadline_s must be a number of seconds above 0, got {deadline_s!r}")
        body["deadline_s"] = float(deadline_s)
    return frame(body)


def change_role(key: str, iid: str, role: str) -> bytes:
    """Return the ChangeRole frame for an instance. Raises BadRequest."""
    if role not in ROLES:
        raise BadRequest(f"role must be {', '.join(ROLES[:-1])} or {ROLES[-1]}, got {role!r}")
    if not isinstance(iid, str) or not 0 < len(iid) <= MAX_NAME:
        raise BadRequest(f"an instance's name is a text of 1 to {MAX_NAME} characters")
    return frame({"type": "change_role", "key": key, "iid": iid, "role": role})


def frame(body: Mapping[str, Any]) -> bytes:
    """Encode a message. Raises BadRequest if that fails or the frame is too large."""
    try:
        data: bytes = VERSION + msgpack.packb(body)
    except (UnicodeEncodeError, OverflowError) as error:
        raise BadRequest(f"the request cannot be encoded: {error}") from None
    if len(data) > MAX_SENT:
        raise BadRequest(f"the request has {len(data)} bytes, at most {MAX_SENT} can be sent")
    return data


def _turn(message: Turn | Mapping[str, str]) -> dict[str, str]:
    if not isinstance(message, Turn | Mapping):
        raise BadRequest("each message must be a Turn or a mapping with role and content")
    found = {"role": message.role, "content": message.content} if isinstance(message, Turn) else dict(message)
    if set(found) != {"role", "content"} or not all(isinstance(value, str) for value in found.values()):
        raise BadRequest("each message must have exactly a role and a content, both strings")
    return found


_DEFAULTS = AskedSampling()
_KINDS = {name: type(getattr(_DEFAULTS, name)) for name in AskedSampling.__struct_fields__}
_KINDS |= {"max_tokens": int, "seed": int}


def _checked(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Check the types here: the broker drops what it cannot decode, and the client would wait until its timeout."""
    given = {name: value for name, value in sampling.items() if value is not None}
    if isinstance(given.get("stop"), str | tuple):
        given["stop"] = [given["stop"]] if isinstance(given["stop"], str) else list(given["stop"])
    for name, value in given.items():
        if name not in _KINDS:
            raise BadRequest(f"{name!r} is not a sampling parameter; known: {', '.join(_KINDS)}")
        if not _is(value, _KINDS[name]):
            raise BadRequest(f"{name} must be {_KIND_NAMES[_KINDS[name]]}, got {value!r}")
        if _KINDS[name] is float:
            given[name] = _float(name, value)
    problem = sampling_problem(AskedSampling(**given))
    if problem:
        raise BadRequest(problem)
    return given


def _float(name: str, value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        raise BadRequest(f"{name} is too large") from None


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
    "status": {
        **{"instances": list, "requests": dict, "counters": dict, "model": str},
        **{"monitor": (dict, type(None)), "notes": list},
    },
}


def parse(data: bytes) -> dict[str, Any] | None:
    """Decode a frame of the broker. Returns None if this client does not understand it."""
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
    reply: dict[str, Any] = {"type": tag}
    for name, kind in kinds.items():  # loops, which are faster: this runs for every Delta
        reply[name] = body.get(name)
        if not isinstance(reply[name], kind):
            return None
    for token in reply.get("ids", ()):
        if type(token) is not int:
            return None
    try:
        if tag == "done":
            reply["usage"], reply["receipt"] = Usage(**reply["usage"]), Receipt(**reply["receipt"])
            reply["usage"].completion_tokens + 0  # a number, or TypeError
    except TypeError:
        return None
    return reply
