"""The types of tetri/wire/ in the words of docs/protocol.md."""

import json
import types
import typing
from enum import Enum
from typing import Any

import msgspec

_WORDS = {str: "string", bytes: "bytes", int: "integer", float: "number", bool: "boolean", type(None): "nil"}


def described(kind: Any) -> str:
    """`list[int] | None` as "array of integer or nil"."""
    if kind in _WORDS:
        return _WORDS[kind]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return described(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(described(argument) for argument in arguments)
    if origin is list:
        return f"array of {described(arguments[0])}"
    if origin is dict:
        return f"map of {described(arguments[0])} to {described(arguments[1])}"
    if issubclass(kind, Enum):
        return "stage"
    assert issubclass(kind, msgspec.Struct), kind
    return kind.__name__


def default(field: msgspec.structs.FieldInfo) -> str:
    """A field's default as JSON; "required" when it has none."""
    if field.default_factory is not msgspec.NODEFAULT:
        return json.dumps(msgspec.to_builtins(field.default_factory()))
    if field.default is msgspec.NODEFAULT:
        return "required"
    if isinstance(field.default, msgspec.Struct):
        return "its defaults"
    return "nil" if field.default is None else json.dumps(field.default)


def rows(kind: type[msgspec.Struct]) -> list[tuple[str, str, str]]:
    """(name, type, default) of every field."""
    return [(field.name, described(field.type), default(field)) for field in msgspec.structs.fields(kind)]


def structs(kind: Any) -> list[type[msgspec.Struct]]:
    """All records that a union or record is made of, itself first."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        inner = [found for field in msgspec.structs.fields(kind) for found in structs(field.type)]
        return list(dict.fromkeys([kind, *inner]))
    return list(dict.fromkeys(found for argument in typing.get_args(kind) for found in structs(argument)))
