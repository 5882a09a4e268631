import struct
from contextlib import suppress

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.wire.message_strategies import UNIONS, values
from tetri.request import AskedSampling, Sampling
from tetri.wire import codec
from tetri.wire.clients import Attach, ClientMessage, Submit
from tetri.wire.codec import WireError, decode, encode, limit
from tetri.wire.messages import Assign, InboxMessage, WorkerEvent

ATTACH = {"type": "attach", "rid": "r1", "secret": "s"}


def packed(value: object) -> bytes:
    return b"\x04" + msgpack.packb(value)


@pytest.mark.parametrize("name", UNIONS)
def test_every_message_comes_back_as_it_was(name):
    @given(values(UNIONS[name]))
    @settings(max_examples=150, deadline=None)
    def holds(message):
        data = encode(message)
        assert data[0] == codec.VERSION
        assert decode(data, UNIONS[name]) == message
        assert msgpack.unpackb(data[1:], strict_map_key=False)["type"] == type(message).__struct_config__.tag

    holds()


def test_defaults_may_be_left_out_and_whole_numbers_stand_for_floats():
    data = packed({"type": "submit", "key": "k", "secret": "s", "prompt": "hi", "sampling": {"temperature": 1}})
    asked = Submit(key="k", secret="s", prompt="hi", sampling=AskedSampling(temperature=1.0))
    assert decode(data, ClientMessage) == asked
    assert decode(memoryview(packed(ATTACH)), ClientMessage) == Attach(rid="r1", secret="s")


@pytest.mark.parametrize(
    ("data", "kind", "says"),
    [
        (b"", "empty", "empty frame"),
        (b"\x04", "unreadable", "truncated"),
        (b"\x01" + msgpack.packb(ATTACH), "version", "protocol version 1, expected 4"),
        (msgpack.packb(ATTACH), "version", "protocol version 131"),
        (packed(ATTACH) + b"\x00", "unreadable", "trailing"),
        (packed({"type": "attach"}), "unexpected", "`rid`"),
        (packed({"type": "attach", "rid": "r1"}), "unexpected", "`secret`"),
        (packed({"type": "submit", "key": "k", "prompt": "hi"}), "unexpected", "`secret`"),
        (packed({"rid": "r1"}), "unexpected", "`type`"),
        (packed({**ATTACH, "type": "nonsense"}), "unexpected", "nonsense"),
        (packed({**ATTACH, "type": "assign"}), "unexpected", "assign"),  # another receiver's message
        (packed({"type": "change_role", "key": "k", "iid": "d0", "role": "mixed"}), "unexpected", "change_role"),
        (packed({"type": "end_request", "rid": "r1"}), "unexpected", "end_request"),
        (packed({**ATTACH, "more": 1}), "unexpected", "`more`"),
        (packed({**ATTACH, "start": "0"}), "unexpected", "$.start"),
        (packed({**ATTACH, "start": 1.0}), "unexpected", "$.start"),
        (packed({"type": "submit", "key": "k", "secret": "s", "sampling": {"heat": 1}}), "unexpected", "`heat`"),
        (packed({"type": "submit", "key": "k", "secret": "s", "prompt": [1, "2"]}), "unexpected", "$.prompt[1]"),
        (packed([1, 2]), "unexpected", "array"),
        (b"\x04\x82\xa4type\xa6attach\xa3rid\xa1\xff", "unreadable", "utf-8"),
    ],
)
def test_what_is_no_message_is_refused_with_its_reason(data, kind, says):
    with pytest.raises(WireError) as caught:
        decode(data, ClientMessage)
    assert caught.value.kind == kind
    assert says in str(caught.value)


@pytest.mark.parametrize("token", [-1, 1 << 32])
def test_a_token_id_of_a_worker_that_no_tokenizer_has_is_no_message(token):
    frame = packed({"type": "tokens", "iid": "d0", "incarnation": 1, "items": [["r1", 1, 0, [7, token], None]]})
    with pytest.raises(WireError, match=r"ids|\[3\]"):
        decode(frame, WorkerEvent)


@pytest.mark.parametrize(
    "value", [{**ATTACH, "x" * 100_000: 1}, {"type": "y\n" * 100_000}, {**ATTACH, "z\n\x1b[31m": 1}]
)
def test_a_reason_is_one_short_printable_line_whatever_was_sent(value):
    with pytest.raises(WireError) as caught:
        decode(packed(value), ClientMessage)
    assert len(str(caught.value)) <= 160
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "bomb",
    [
        b"\x91" * 1_000_000,  # arrays in arrays
        b"\x82\xa4type\xa6submit\xa6prompt" + b"\x91" * 1_000_000,
        b"\x82\xa4type\xa6submit\xa6prompt\xdd" + struct.pack(">I", 0xFFFFFFFF),  # announces 34 GB of list
        b"\xdf" + struct.pack(">I", 0xFFFFFFFF),
        b"\x82\xa4type\xa6submit\xa3key\xdb" + struct.pack(">I", 0xFFFFFFFF),
    ],
)
def test_a_bomb_is_refused_before_it_takes_memory(bomb):
    with pytest.raises(WireError):
        decode(b"\x04" + bomb, ClientMessage)


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_random_bytes_raise_nothing_but_a_wire_error(noise):
    for union in UNIONS.values():
        for data in (noise, b"\x04" + noise):
            with pytest.raises(WireError):
                decode(data, union)


@given(values(InboxMessage), st.data())
@settings(max_examples=200, deadline=None)
def test_a_damaged_message_is_a_message_or_a_wire_error(message, data):
    damaged = bytearray(encode(message))
    damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with suppress(WireError):
        assert isinstance(decode(bytes(damaged), InboxMessage), msgspec.Struct)


def test_each_union_has_its_own_size_limit_and_what_is_over_all_of_them_is_not_encoded():
    head = len(encode(Submit(key="k", secret="s", prompt="")))
    longest = Submit(key="k", secret="s", prompt="x" * (limit(ClientMessage) - head - 4))
    assert len(encode(longest)) == limit(ClientMessage)
    assert decode(encode(longest), ClientMessage) == longest
    with pytest.raises(WireError, match="4194305 bytes, at most 4194304"):
        decode(encode(msgspec.structs.replace(longest, key="kk")), ClientMessage)
    prompt = [1 << 31] * (4 << 20)
    with pytest.raises(WireError, match="Assign has 209.* at most 16777216"):
        encode(Assign(rid="r", attempt=1, prompt=prompt, output=[], sampling=Sampling()))
