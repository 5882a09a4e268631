"""Leases on a segment's file."""

import os
import threading
import time

import pytest

from tetri.kv.base import KVLost
from tetri.kv.lease import all_fallen, lease, wanted_back
from tetri.kv.segment import create


@pytest.fixture
def card(tmp_path):
    made = create(str(tmp_path), "test", "p0", 2, 64)
    yield made, str(tmp_path / made.segment.name)
    made.close()


def test_the_owner_waits_for_the_last_lease(card):
    made, path = card
    held = [lease(path, 0) for _ in range(2)]
    assert not all_fallen(made.descriptor, 0.0)
    os.close(held.pop())
    threading.Timer(0.05, os.close, held).start()
    start = time.monotonic()
    assert all_fallen(made.descriptor, 20.0)
    assert 0.04 < time.monotonic() - start < 10


def test_once_the_owner_has_asked_there_is_no_new_lease(card):
    made, path = card
    assert all_fallen(made.descriptor, 0.0)
    with pytest.raises(KVLost, match="was closed"):
        lease(path, 0)


def test_there_is_no_lease_on_a_segment_that_its_owner_closes_between_the_readers_open_and_its_lock(card, monkeypatch):
    made, path = card
    before = os.open
    monkeypatch.setattr(os, "open", lambda *args: (before(*args), made.unlink(path))[0])
    with pytest.raises(KVLost, match="was closed"):
        lease(path, 0)


@pytest.mark.parametrize("path", ["/nowhere/at/all", "a\0b", "/" + "x" * 5000])
def test_what_is_not_there_is_lost(path):
    with pytest.raises(KVLost) as caught:
        lease(path, 0)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("ends", ["closes", "is killed"])
def test_a_lease_says_whether_the_memory_is_wanted_back(card, ends):
    made, path = card
    held = lease(path, 0)
    assert not wanted_back(held)
    assert not wanted_back(held), "looking changes nothing"
    os.unlink(path)
    assert not wanted_back(held), "others have removed its name, and its owner lives"
    os.close(lease(path, os.getpid()))
    if ends == "closes":
        made.unlink(path)
    else:
        made.close()  # what the kernel does
    assert wanted_back(held)
    os.close(held)
