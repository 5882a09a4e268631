"""What every slab promises (tetri/kv/base.py), as tests that run on any: a class with a `slab` fixture that gives a
slab of SLOTS free slots; and `slab_histories(make)`, random histories against a model."""

import sys
import threading
import time
from contextlib import suppress

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from msgspec.structs import replace

from tests.kv.parties import SLOTS
from tetri.kv.base import KVError


def nothing(views):
    """Leaves in the blocks what is there."""


def joined(one, other):
    return replace(one, slots=one.slots + other.slots, generations=one.generations + other.generations)


def misshapen(handle):
    """Handles that fit no slab, made of one that is live."""
    yield replace(handle, segment="another")
    yield replace(handle, block_bytes=handle.block_bytes + 1)
    yield from (replace(handle, slots=[slot, *handle.slots[1:]]) for slot in (SLOTS, -1))
    yield replace(handle, slots=handle.slots * 2, generations=handle.generations * 2)
    yield replace(handle, generations=[])


class SlabContract:
    @pytest.fixture
    def often(self):
        """Threads change at every other line, so that a few thousand rounds meet what otherwise takes hours."""
        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        yield
        sys.setswitchinterval(before)

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
    """Random puts, keeps, let-gos and frees against a plain count of each handle's owners. A wrong one is refused and
    changes nothing."""

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

    @rule(count=st.integers(-1, SLOTS), fails=st.booleans())
    def put(self, count, fails):
        def write(views):
            assert len(views) == count
            if fails:
                raise ZeroDivisionError

        free = self.slab.free_slots
        if not 0 <= count <= free:
            with pytest.raises(KVError, match=f"{count} slots asked, {free} are free"):
                self.slab.put(count, write)
        elif fails:
            with pytest.raises(ZeroDivisionError):
                self.slab.put(count, write)
        else:
            handle, _ = self.slab.put(count, write)
            assert not self.used() & {*handle.slots}
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
        free = self.slab.free_slots
        self.kept.remove(handle)
        assert self.slab.let_go(handle) == self.slab.free_slots - free

    @precondition(lambda self: self.dead)
    @rule(data=st.data())
    def use_what_was_freed(self, data):
        handle = data.draw(st.sampled_from(self.dead))
        self.refused(handle, *(joined(other, handle) for other in self.owned))
        if not self.used() & {*handle.slots}:  # the generations are right, but the slots nobody's
            self.refused(replace(handle, generations=[generation + 1 for generation in handle.generations]))

    @precondition(lambda self: any(handle.slots for handle in self.owned))
    @rule(data=st.data())
    def use_a_wrong_handle(self, data):
        handle = data.draw(st.sampled_from([handle for handle in self.owned if handle.slots]))
        first, *rest = handle.generations
        self.refused(*misshapen(handle), *(replace(handle, generations=[first + by, *rest]) for by in (1, -1)))
        not_kept = [] if handle in self.kept else [handle, *(joined(other, handle) for other in self.kept)]
        for wrong in (*misshapen(handle), *not_kept):
            with pytest.raises(KVError, match="cannot let go"):
                self.slab.let_go(wrong)

    def refused(self, *handles):
        for handle in handles:
            assert not self.slab.keep(handle)
            with pytest.raises(KVError, match="cannot free"):
                self.slab.free(handle)

    @rule()
    def count(self):
        self.came += self.slab.freed()
        assert self.slab.freed() == 0 and self.came == self.were_put - len(self.used())

    def used(self):
        return {slot for handle in (*self.owned, *self.kept) for slot in handle.slots}

    @invariant()
    def slots_add_up(self):
        assert self.slab.free_slots == SLOTS - len(self.used())


def slab_histories(make):
    """A test case of random histories on slabs that `make` makes, of SLOTS free slots each."""
    machine = type("Histories", (_Histories,), {"make": staticmethod(make)})
    machine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
    return machine.TestCase
