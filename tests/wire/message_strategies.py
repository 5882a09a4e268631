"""Hypothesis strategies for every message, made from the types that tetri/wire/ declares."""

import types
import typing
from enum import Enum
from typing import Any

import msgspec
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from tetri.request import LengthRange
from tetri.wire.clients import BrokerReply, ClientMessage, OperatorMessage
from tetri.wire.messages import ClusterView, InboxMessage, LoadReport, WorkerEvent

UNIONS = {"ClientMessage": ClientMessage, "BrokerReply": BrokerReply, "WorkerEvent": WorkerEvent}
UNIONS |= {"OperatorMessage": OperatorMessage}
UNIONS |= {"InboxMessage": InboxMessage, "LoadReport": LoadReport, "ClusterView": ClusterView}

_PLAIN: dict[Any, SearchStrategy[Any]] = {
    str: st.text(max_size=12),
    bytes: st.binary(max_size=12),
    int: st.integers(-(1 << 63), (1 << 64) - 1),  # what MessagePack can carry
    float: st.floats(allow_nan=False),
    bool: st.booleans(),
    type(None): st.none(),
}


def values(kind: Any) -> SearchStrategy[Any]:
    """Any value of a type that a message's field may have."""
    if kind in _PLAIN:
        return _PLAIN[kind]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _constrained(arguments[0], arguments[1])
    if origin in (typing.Union, types.UnionType):
        return st.one_of([values(argument) for argument in arguments])
    if origin is list:
        return st.lists(values(arguments[0]), max_size=4)
    if origin is dict:
        return st.dictionaries(values(arguments[0]), values(arguments[1]), max_size=3)
    if issubclass(kind, Enum):
        return st.sampled_from(kind)
    assert issubclass(kind, msgspec.Struct), kind
    if kind is LengthRange:
        ends = st.lists(st.integers(0, (1 << 64) - 1), min_size=2, max_size=2, unique=True).map(sorted)
        return ends.map(lambda pair: LengthRange(low=pair[0], high=pair[1]))
    fields = msgspec.structs.fields(kind)
    return st.builds(kind, **{field.name: values(field.type) for field in fields})


def _constrained(kind: Any, meta: msgspec.Meta) -> SearchStrategy[Any]:
    if kind is str:
        return st.text(min_size=meta.min_length or 0, max_size=min(meta.max_length or 12, 12))
    assert kind is int, kind
    low = meta.ge if meta.ge is not None else -(1 << 63)
    return st.integers(int(low), int(meta.le if meta.le is not None else (1 << 64) - 1))
