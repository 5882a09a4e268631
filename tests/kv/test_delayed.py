"""Fetches that start late: at their time, in the order in which they were asked, or never when the peer goes."""

from types import NoneType

from tetri.kv.base import Fetched, KVLost, Wanted
from tetri.kv.delayed import DelayedStore
from tetri.wire.handover import Handle

NOTHING = Handle(segment="s", slots=[], generations=[], block_bytes=1)


class Under:
    """A store that writes down what it is asked for; over `stream` it answers `later` what it has in `later`."""

    slots = free_slots = reach = put = free = freed = meet = counters = None

    def __init__(self):
        self.asked, self.later, self.gone, self.wakes, self.closed = [], [], [], None, False

    def fetch(self, wanted):
        self.asked.append(wanted.ticket[1])
        return None if wanted.path == "stream" else Fetched(wanted.ticket, [b"block"])

    def fetched(self):
        later, self.later = self.later, []
        return later

    def due(self):
        return self.wakes

    def part(self, peer):
        self.gone.append(peer)

    def close(self):
        self.closed = True


def late(number, peer="p0"):
    return Wanted(("d", number), peer, "shm", NOTHING, None)


def test_fetches_start_at_their_time_and_those_of_a_gone_peer_are_lost():
    now = 0.0
    under = Under()
    store = DelayedStore(under, lambda: now)
    under.wakes, under.later = 7.0, [Fetched(("d", 5))]
    assert store.due() == 7.0
    store.late += [(2.0, late(1)), (1.0, late(2)), (3.0, late(3)), (1.0, late(4, "p1"))]
    assert store.due() == 1.0
    store.part("p1")
    assert store.due() == 0.0 and under.gone == ["p1"]
    now = 2.0
    found = [(fetched.ticket[1], type(fetched.problem)) for fetched in store.fetched()]
    assert found == [(4, KVLost), (1, NoneType), (2, NoneType), (5, NoneType)] and under.asked == [1, 2]
    assert list(store.fetched()) == [] and store.due() == 3.0
    store.close()
    assert store.due() == 7.0 and under.closed
