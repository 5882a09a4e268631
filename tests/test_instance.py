"""The record of what an instance is."""

import msgspec
import pytest
from msgspec.structs import replace

from tests.core.build import FINGERPRINT, instance
from tetri.instance import Instance, difference


def test_a_change_of_role_changes_nothing_else():
    before = instance("d0", "decode", incarnation=7)
    after = before.in_role("mixed")
    assert (before.role, after.role) == ("decode", "mixed")
    assert after.in_role("decode") == before


def test_it_comes_back_from_the_wire_as_it_went_and_refuses_what_it_does_not_know():
    there = instance("d0", "decode")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(there), type=Instance) == there
    body = msgspec.to_builtins(there) | {"colour": "red"}
    with pytest.raises(msgspec.ValidationError, match="colour"):
        msgspec.convert(body, Instance)


def test_fingerprints_differ_by_name():
    assert difference(FINGERPRINT, FINGERPRINT) is None
    for name in FINGERPRINT.__struct_fields__:
        other = replace(FINGERPRINT, **{name: type(getattr(FINGERPRINT, name))(77)})
        assert (difference(FINGERPRINT, other) or "").startswith(f"{name} differs: ")
