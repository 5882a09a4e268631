"""Encode and decode the client's frames: a version byte, then a tagged map in MessagePack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import asdict

from tetri.request import (
    DEFAULT_TOKENS,
    ROLES,
    AskedSampling,
    Positive,
    Receipt,
    Record,
    Slo,
    Token,
    TokenLogprob,
    Turn,
    Usage,
    choices_problem,
    sampling_problem,
    slo_problem,
)
from tetri.wire.clients import BrokerReply, ChangeRole

VERSION = b"\x04"
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


class RequestLost(RequestRefused):
    """The broker no longer knows a request that it had accepted, for instance since it was started again."""


class Unreachable(TetriError):
    """The broker does not answer."""


class RequestFailed(TetriError):
    """An accepted request failed. `result` has the output so far."""

    def __init__(self, reason: str, result: Result) -> None:
        super().__init__(reason)
        self.result = result


@dataclass(frozen=True, slots=True)
class Result:
    """A finished request: its first choice, or another one. `finish_reason`: stop, length, cancelled or deadline.
    `timeline`: seconds in each stage; they add up to `jct_s`, the time from the broker's Accepted to the end. `ttft_s`:
    time to the first token, None without one. `logprobs`: the output tokens with their log probabilities, if these were
    asked for. `slo`: its limits of latency. `slo_result`: met, or which it missed: ttft, tpot or both; failed; "" if it
    was cancelled before it had missed any. `others`: of the first choice, the results of all others."""

    rid: str
    text: str
    token_ids: list[int]
    finish_reason: str
    usage: Usage
    timeline: dict[str, float]
    ttft_s: float | None
    jct_s: float
    receipt: Receipt
    choice: int = 0
    logprobs: list[TokenLogprob] | None = None
    slo: Slo = Slo()
    slo_result: str = ""
    others: tuple[Result, ...] = ()

    @property
    def choices(self) -> tuple[Result, ...]:
        """The results of all choices, this one first."""
        return (self, *self.others)

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain values for json.dumps; with several choices, a list of their results. A log
        probability of minus infinity is null."""
        if self.others:
            return {"rid": self.rid, "choices": [replace(each, others=()).to_json() for each in self.choices]}
        plain = {name: getattr(self, name) for name in self.__slots__ if name != "others"}
        plain |= {"usage": asdict(self.usage), "receipt": asdict(self.receipt), "slo": asdict(self.slo)}
        if self.logprobs is not None:
            plain["logprobs"] = [_plain(token) for token in self.logprobs]
        return plain


def _plain(token: TokenLogprob) -> dict[str, Any]:
    def number(logprob: float) -> float | None:
        return None if logprob == -inf else logprob

    top = {str(other): number(logprob) for other, logprob in token.top.items()}
    return {"id": token.id, "logprob": number(token.logprob), "top": top}


class Event(Struct, frozen=True):
    """What is new of one choice. `tokens`: its next output tokens, each a TokenLogprob if log probabilities were asked
    for. `text`: what they complete; often empty. `result`: set in the last event of the choice."""

    choice: int
    text: str
    tokens: tuple[Token, ...]
    result: Result | None = None


def submit(
    key: str,
    secret: str,
    prompt: str | Sequence[int] | None,
    messages: Sequence[Turn | Mapping[str, str]] | None,
    sampling: Mapping[str, Any],
    n: int = 1,
    deadline_s: float | None = None,
    default_tokens: int | None = None,
    slo: Slo | None = None,
) -> bytes:
    """Return the Submit frame of one request. Raises BadRequest."""
    body: dict[str, Any] = {"type": "submit", "key": key, "secret": secret}
    if n != 1:
        body["n"] = _converted("n", n, Positive)
    if default_tokens is not None:
        body["default_tokens"] = _converted("default_tokens", default_tokens, Positive)
    body["sampling"] = _checked(sampling, n, default_tokens or DEFAULT_TOKENS)
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
        body["deadline_s"] = _converted("deadline_s", deadline_s, float)
        if not body["deadline_s"] > 0:
            raise BadRequest(f"deadline_s must be above 0, got {deadline_s!r}")
    if slo is not None:
        body["slo"] = limits = _converted("slo", asdict(slo) if isinstance(slo, Slo) else slo, Slo)
        if (problem := slo_problem(limits)) is not None:
            raise BadRequest(problem)
    return frame(body)


def change_role(key: str, iid: str, role: str) -> bytes:
    """Return the ChangeRole frame for an instance. Raises BadRequest."""
    if role not in ROLES:
        raise BadRequest(f"role must be {', '.join(ROLES[:-1])} or {ROLES[-1]}, got {role!r}")
    if not isinstance(iid, str) or not 0 < len(iid) <= MAX_NAME:
        raise BadRequest(f"an instance's name is a text of 1 to {MAX_NAME} characters")
    return frame(ChangeRole(key=key, iid=iid, role=role))


def frame(body: Mapping[str, Any] | Record) -> bytes:
    """Encode a message. Raises BadRequest if that fails, the broker could not decode it or the frame is too large."""
    try:
        encoded = msgspec.msgpack.encode(body)
        if isinstance(body, Record):
            msgspec.msgpack.decode(encoded, type=type(body))
        data = VERSION + encoded
    except (UnicodeEncodeError, OverflowError, msgspec.ValidationError) as error:
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


def _checked(sampling: Mapping[str, Any], n: int, default_tokens: int) -> dict[str, Any]:
    """Check the values here: the broker drops what it cannot decode, and the client would wait until its timeout."""
    given = {name: value for name, value in sampling.items() if value is not None}
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    for name in given:
        if name not in AskedSampling.__struct_fields__:
            known = ", ".join(AskedSampling.__struct_fields__)
            raise BadRequest(f"{name!r} is not a sampling parameter; known: {known}")
    asked = _converted("sampling", given, AskedSampling)
    problem = sampling_problem(asked, default_tokens) or choices_problem(n, asked)
    if problem:
        raise BadRequest(problem)
    return {name: getattr(asked, name) for name in given}


def _converted(name: str, value: Any, kind: Any) -> Any:
    """Return the value as this type. Raises BadRequest if it is of another."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        what, _, where = str(error).replace("`", "").partition(" - at ")
        raise BadRequest(f"{where.rpartition('$.')[2] or name}: {what[:1].lower()}{what[1:]}") from None


_decoder = msgspec.msgpack.Decoder(BrokerReply)


def parse(data: bytes) -> BrokerReply | None:
    """Decode a frame of the broker. Returns None if this client does not understand it."""
    if data[:1] != VERSION:
        return None
    try:
        reply: BrokerReply = _decoder.decode(memoryview(data)[1:])
        return reply
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
