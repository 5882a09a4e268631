"""docs/protocol.md held against the code: every table, every tag, every byte."""

import json
import re
from pathlib import Path

import msgpack
import msgspec
import pytest

from tests.wire.described import rows, structs
from tetri.core.broker.delivery import SECRET_CHARS
from tetri.kv.stream.fetch import StreamPatience
from tetri.kv.stream.serve import MAX_FETCHES
from tetri.net import sockets
from tetri.wire import bulk, codec
from tetri.wire.bulk import BulkReply, BulkRequest
from tetri.wire.clients import BrokerReply, ClientMessage, OperatorMessage
from tetri.wire.messages import ClusterView, InboxMessage, LoadReport, WorkerEvent

TEXT = (Path(__file__).parent.parent.parent / "docs" / "protocol.md").read_text()
UNIONS = (ClientMessage, OperatorMessage, BrokerReply, WorkerEvent, InboxMessage, LoadReport, ClusterView)
UNIONS += (BulkRequest, BulkReply)
RECORDS = list(dict.fromkeys(record for union in UNIONS for record in structs(union)))
UNION_OF = {record.__struct_config__.tag: union for union in UNIONS for record in structs(union)}
MUST_HAVE_VECTORS = {"submit", "accepted", "refused", "delta", "done", "cancel", "tokens", "chunk"}
MUST_HAVE_VECTORS |= {"fetch", "piece", "load", "view", "change_role", "role_changed", "flip", "flip_wanted"}
MUST_HAVE_VECTORS |= {"length_update", "close", "attach", "end_request", "offer", "defer"}


def sections() -> dict[str, str]:
    """Text under every heading of the fourth level."""
    _, *parts = re.split(r"^#### ", TEXT, flags=re.M)
    found = {}
    for part in parts:
        heading, body = part.split("\n", 1)
        assert heading not in found, f"two sections {heading}"
        found[heading] = re.split(r"^##+ ", body, flags=re.M)[0]
    return found


SECTIONS = sections()
VECTORS = {
    heading: re.fullmatch(r"\s*```json\n(.*)\n```\n```hex\n(.*)\n```\s*", body, flags=re.S)
    for heading, body in SECTIONS.items()
    if "```hex" in body
}


def heading_of(record):
    tag = record.__struct_config__.tag
    return f"`{tag}`" if tag else record.__name__


@pytest.mark.parametrize("record", RECORDS, ids=heading_of)
def test_the_table_of_every_record_is_what_the_code_declares(record):
    table = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \|", SECTIONS[heading_of(record)], flags=re.M)
    assert [(name, kind.strip(), default.strip(" `")) for name, kind, default in table] == rows(record)


def test_the_document_has_the_codes_messages_and_bytes_of_those_that_a_client_needs():
    described = {heading for heading in SECTIONS if heading not in VECTORS}
    assert described == {heading_of(record) for record in RECORDS}
    tags = [json.loads(" ".join(found[1].split("\n")))["type"] for found in VECTORS.values()]
    assert set(tags) >= MUST_HAVE_VECTORS
    assert tags.count("submit") >= 2


def test_the_limits_are_the_codes():
    assert "| a frame to the broker's clients socket | 4 MiB," in TEXT
    assert "| a frame to the broker's operators socket | 64 KiB |" in TEXT
    assert f"| a secret | at least {SECRET_CHARS} and at most 128 characters |" in TEXT
    assert "| any other frame | 16 MiB |" in TEXT
    assert "| a LoadReport | 64 KiB |" in TEXT and "| a ClusterView | 4 MiB |" in TEXT
    assert [codec.limit(union) >> 10 for union in UNIONS] == [4096, 64, 16384, 16384, 16384, 64, 4096, 256, 2]
    assert "| a frame to the server of the KV stream | 256 KiB |" in TEXT and f"at most {bulk.MAX_SLOTS} slots" in TEXT
    assert "| a frame from it | 2 KiB, a payload 1 MiB |" in TEXT and bulk.PIECE_BYTES == 1 << 20
    assert f"| fetches of one receiver at one server | {MAX_FETCHES}, then Gone |" in TEXT
    assert f"{StreamPatience().stall_s:g} s; after {StreamPatience().lost_s:g} s" in TEXT
    assert f"| {sockets.VIEWS_WAITING}, then it misses the next |" in TEXT
    assert f"| {sockets.LOADS_WAITING} of each worker, then it misses the next |" in TEXT
    assert TEXT.startswith(f"# The tetri protocol, version {codec.VERSION}\n")


@pytest.mark.parametrize("heading", VECTORS)
def test_the_bytes_are_the_message_and_the_message_is_the_bytes(heading):
    values = json.loads(" ".join(VECTORS[heading][1].split("\n")))
    data = bytes.fromhex(VECTORS[heading][2].replace("\n", ""))
    union = UNION_OF[values["type"]]
    message = codec.decode(data, union)
    assert msgspec.to_builtins(message) == values
    assert data[0] == codec.VERSION
    if "read only" not in heading:
        assert codec.encode(message) == data
        assert bytes([codec.VERSION]) + msgpack.packb(values) == data  # any MessagePack library will do
        assert msgpack.unpackb(data[1:]) == values
