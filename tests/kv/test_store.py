"""A worker's store: its slab and the reader of each path (tests/kv/contract.py has what a path promises)."""

import os
from contextlib import closing
from types import SimpleNamespace

import pytest
import zmq
from live import wait_until

from tests.kv.parties import block
from tetri.kv import StoreSettings, open_store
from tetri.kv.base import KVError, KVLost, Wanted
from tetri.net import keys
from tetri.policy import pairing


@pytest.fixture
def store():
    store = open_store(StoreSettings("test-store", "p0", 2, 100, "shm"))
    yield store
    store.close()


def put(store):
    return store.put(1, lambda views: views[0].__setitem__(slice(None), block(1)), "p:r1:1")


def test_what_others_must_know_to_read_it_and_that_only_those_of_its_deployment_are_paired(store):
    assert store.reach.paths == ["shm"]
    assert store.reach.process == os.getpid() and str(os.geteuid()) in store.reach.host
    assert store.reach.segment.startswith("tetri-test-store-p0-")
    assert (store.slots, store.free_slots, store.due()) == (2, 2, None)
    for name, common in (("test-store", "shm"), ("test-other", None)):
        other = open_store(StoreSettings(name, "d0", 2, 100, "shm"))
        try:
            assert pairing.path(store.reach, other.reach) == common  # their readers refuse each other's segments
        finally:
            other.close()


def test_a_worker_reads_its_own_slab_without_meeting_itself_and_over_a_path_that_it_has(store):
    handle, digest = put(store)
    fetched = store.fetch(Wanted(("d", 0), "p0", "local", handle, digest))
    assert [bytes(view) for view in fetched.blocks] == [block(1)]

    for path in ("nixl", "carrier pigeon", ""):
        fetched = store.fetch(Wanted(("d", 0), "p0", path, handle, digest))
        assert isinstance(fetched.problem, KVLost) and not fetched.blocks


def test_only_the_paths_that_both_have_are_met(store):
    met = []

    reader = {"meet": lambda peer, reach: met.append(peer), "part": met.remove, "close": lambda: None}
    store.readers["other"] = SimpleNamespace(**reader)
    reach = store.reach
    store.meet("p1", reach)
    assert met == []
    reach.paths.append("other")
    store.meet("p1", reach)
    assert met == ["p1"]
    store.part("p1")
    assert met == []


def test_an_unknown_transport_is_one_line_that_names_the_known():
    with pytest.raises(KVError, match="unknown KV transport 'carrier pigeon'") as caught:
        open_store(StoreSettings("test-store", "p0", 2, 10, "carrier pigeon"))
    assert all(path in str(caught.value) for path in pairing.TRANSPORTS)
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("tetri-test-store-")], "nothing is left"


def test_what_a_path_counts_is_named_after_it(store, tmp_path):
    """Of the stream, which has two threads that count; shared memory counts nothing."""
    assert store.counters() == {}
    stranger, key = zmq.Context(), str(tmp_path / "key")
    keys.generate(key)
    with closing(open_store(StoreSettings("test-store", "d0", 2, 100, "stream", key=key))) as streaming, stranger:
        socket = stranger.socket(zmq.DEALER)
        keys.introduce(socket, keys.load(key))
        socket.connect(streaming.reach.address)
        socket.send(b"nonsense")
        counted = {"stream_served_garbage_version": 1}
        wait_until(lambda: streaming.counters() == counted, "not counted")
        socket.close(0)
