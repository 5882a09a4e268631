"""Fetches that start late: at their time, in the order in which they were asked, or never when the peer goes."""

from tetri.kv.base import Fetched, KVLost, Wanted
from tetri.kv.delayed import DelayedStore
from tetri.wire.handover import Handle

NOTHING = Handle(segment="s", slots=[], generations=[], block_bytes=1)


class Under:
    """A store that answers at once, and says that it must be called by 7.0."""

    slots = free_slots = reach = free = freed = meet = None
    gone, closed = (), False

    def fetch(self, wanted):
        return Fetched(wanted.ticket)

    def fetched(self):
        return [Fetched(("under", 0))]

    def due(self):
        return 7.0

    def part(self, peer):
        self.gone += (peer,)

    def close(self):
        self.closed = True


def late(key, peer="p0"):
    return Wanted((key, 0), peer, "stream", NOTHING, None)


def test_fetches_start_at_their_time_and_those_of_a_gone_peer_are_lost():
    now = 0.0
    under = Under()
    store = DelayedStore(under, lambda: now)
    assert store.due() == 7.0
    store.late += [(2.0, late("a")), (1.0, late("b")), (3.0, late("c")), (1.0, late("d", "p1"))]
    assert store.due() == 1.0
    store.part("p1")
    assert store.due() == 0.0 and under.gone == ("p1",)
    now = 2.0
    found = list(store.fetched())
    assert [fetched.ticket[0] for fetched in found] == ["d", "a", "b", "under"]
    assert isinstance(found[0].problem, KVLost) and found[1].problem is None and store.due() == 3.0
    store.close()
    assert store.due() == 7.0 and under.closed
