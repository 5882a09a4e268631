"""What every slab promises (tetri/kv/base.py), as tests that run on any: a class with a `slab` fixture that gives a
slab of SLOTS free slots; and `slab_histories(make)`, random histories against a model."""

import sys
import threading
import time
from contextlib import suppress

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.kv.parties import SLOTS
from tetri.kv.base import KVError


def nothing(views):
    """Leaves in the blocks what is there."""


def joined(one, other):
    slots, generations = one.slots + other.slots, one.generations + other.generations
    return msgspec.structs.replace(one, slots=slots, generations=generations)


def wrong_handles(handle):
    """Handles that cannot be freed, kept or let go, made of one of a single slot that is live."""
    replace = msgspec.structs.replace
    yield replace(handle, segment="another")
    yield replace(handle, block_bytes=handle.block_bytes + 1)
    yield from (replace(handle, slots=[slot]) for slot in (SLOTS, -1))
    yield replace(handle, slots=handle.slots * 2, generations=handle.generations * 2)
    yield replace(handle, generations=[])
    yield from (replace(handle, generations=[handle.generations[0] + by]) for by in (1, -1))


class SlabContract:
    @pytest.fixture
    def often(self):
        """Threads change at every other line, so that a few thousand rounds meet what otherwise takes hours."""
        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        yield
        sys.setswitchinterval(before)

    def test_freeing_twice_or_what_is_not_there_is_an_error_and_frees_nothing(self, slab):
        first, _ = slab.put(2, nothing)
        second, _ = slab.put(1, nothing)
        slab.free(first)
        for wrong in (first, joined(second, first), *wrong_handles(second)):
            with pytest.raises(KVError, match="cannot free"):
                slab.free(wrong)
        assert slab.free_slots == SLOTS - 1
        slab.free(second)

    def test_too_few_free_slots_is_an_error_and_takes_none(self, slab):
        slab.put(SLOTS - 1, nothing)
        with pytest.raises(KVError, match="2 slots asked, 1 are free"):
            slab.put(2, nothing)
        with pytest.raises(KVError):
            slab.put(-1, nothing)
        assert slab.free_slots == 1
        slab.put(1, nothing)

    def test_what_is_not_there_cannot_be_kept(self, slab):
        handle, _ = slab.put(1, nothing)
        assert not any(slab.keep(wrong) for wrong in wrong_handles(handle))
        slab.free(handle)
        assert slab.free_slots == SLOTS
        generation = handle.generations[0] + 1
        for gone in (handle, msgspec.structs.replace(handle, generations=[generation])):  # as it is, but nobody's
            assert not slab.keep(gone)
            with pytest.raises(KVError, match="cannot free"):
                slab.free(gone)

    def test_letting_go_what_nobody_keeps_is_an_error(self, slab):
        handle, _ = slab.put(1, nothing)
        other, _ = slab.put(1, nothing)
        slab.keep(other)
        for wrong in (handle, joined(other, handle), msgspec.structs.replace(handle, slots=[SLOTS])):
            with pytest.raises(KVError, match="cannot let go"):
                slab.let_go(wrong)
        slab.let_go(other)
        slab.free(handle)
        slab.free(other)
        assert (slab.free_slots, slab.freed()) == (SLOTS, 2)

    def test_a_closed_slab_gives_and_takes_nothing(self, slab):
        (handle, _), (kept, _) = slab.put(1, nothing), slab.put(1, nothing)
        assert slab.keep(kept)
        slab.close()
        slab.close()
        assert not slab.keep(handle)
        with pytest.raises(KVError, match="closed"):
            slab.put(1, nothing)
        with pytest.raises(KVError, match="closed"):
            slab.free(handle)
        with suppress(KVError):  # the memory may be gone, but a thread that sends must be able to end
            slab.let_go(kept)

    def test_threads_that_keep_and_let_go_while_the_owner_puts_and_frees(self, slab, often):
        """No slot is lost or comes free twice."""
        live, stop, problems, kept = [], threading.Event(), [], []

        def hammer():
            try:
                while not stop.is_set():
                    for handle in live[-3:]:
                        if slab.keep(handle):
                            if slab.keep(handle):
                                slab.let_go(handle)
                            slab.let_go(handle)
                            kept.append(handle)
            except Exception as error:  # told in the test's own thread
                problems.append(error)

        threads = [threading.Thread(target=hammer) for _ in range(2)]
        for thread in threads:
            thread.start()
        put = came = number = 0
        deadline = time.monotonic() + 60
        while (number < 2000 or len(kept) < 1000) and time.monotonic() < deadline and not problems:
            number += 1
            came += slab.freed()
            count = number % 3 + 1
            if slab.free_slots >= count:
                live.append(slab.put(count, nothing)[0])
                put += count
            if len(live) > 2 or (live and slab.free_slots < 3):
                slab.free(live.pop(0))
        stop.set()
        for thread in threads:
            thread.join()
        for handle in live:
            slab.free(handle)
        assert problems == []
        assert (came + slab.freed(), slab.free_slots) == (put, SLOTS)
        assert put > 1000 and len(kept) >= 1000


class _Histories(RuleBasedStateMachine):
    """Random puts, keeps, let-gos and frees against a plain count of each handle's owners."""

    def __init__(self):
        super().__init__()
        self.slab = self.make()
        self.owned, self.kept, self.dead = [], [], []
        self.came = self.were_put = 0

    def teardown(self):
        for handle in self.kept:
            self.slab.let_go(handle)
        for handle in self.owned:
            self.slab.free(handle)
        assert self.slab.free_slots == SLOTS
        assert self.came + self.slab.freed() == self.were_put
        self.slab.close()

    @rule(count=st.integers(0, SLOTS), fails=st.booleans())
    def put(self, count, fails):
        def write(views):
            assert len(views) == count
            if fails:
                raise ZeroDivisionError

        if count > self.slab.free_slots:
            with pytest.raises(KVError):
                self.slab.put(count, write)
        elif fails:
            with pytest.raises(ZeroDivisionError):
                self.slab.put(count, write)
        else:
            handle, _ = self.slab.put(count, write)
            used = [slot for other in (*self.owned, *self.kept) for slot in other.slots]
            assert not {*used} & {*handle.slots}
            self.owned.append(handle)
            self.were_put += count

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def free(self, data):
        handle = data.draw(st.sampled_from(self.owned))
        self.owned.remove(handle)
        self.slab.free(handle)
        if handle.slots:
            self.dead.append(handle)

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def keep(self, data):
        handle = data.draw(st.sampled_from(self.owned))
        assert self.slab.keep(handle)
        self.kept.append(handle)

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def let_go(self, data):
        handle = data.draw(st.sampled_from(self.kept))
        self.kept.remove(handle)
        self.slab.let_go(handle)

    @precondition(lambda self: self.dead)
    @rule(data=st.data())
    def use_what_was_freed(self, data):
        handle = data.draw(st.sampled_from(self.dead))
        assert not self.slab.keep(handle)
        with pytest.raises(KVError):
            self.slab.free(handle)

    @rule()
    def count(self):
        self.came += self.slab.freed()
        assert self.slab.freed() == 0 and self.came == self.were_put - len(self.fetched())

    def fetched(self):
        return {slot for handle in (*self.owned, *self.kept) for slot in handle.slots}

    @invariant()
    def slots_add_up(self):
        assert self.slab.free_slots == SLOTS - len(self.fetched())


def slab_histories(make):
    """A test case of random histories on slabs that `make` makes, of SLOTS free slots each."""
    machine = type("Histories", (_Histories,), {"make": staticmethod(make)})
    machine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
    return machine.TestCase
