"""Takes that come as fast as an emulated link would bring them: when, and what."""

import random
from itertools import accumulate

import pytest

from tests.kv.test_delayed import Under
from tetri.config.tables import LINKS as NAMES
from tetri.kv.base import Fetched, Wanted
from tetri.kv.limit import LINKS, LimitedLink, LimitedStore
from tetri.wire.handover import Handle


def test_when_bytes_arrive():
    once = [([(0.0, 100)], [1.0]), ([(7.0, 1)], [7.01])]
    queued = [([(0.0, 100), (0.0, 50), (0.0, 0)], [1.0, 1.5, 1.5]), ([(0.0, 300), (1.0, 100)], [3.0, 4.0])]
    for asked, arrivals in (*once, *queued, ([(0.0, 100), (3.0, 100)], [1.0, 4.0])):  # at last a link idle in between
        link, far = LimitedLink(100.0), LimitedLink(100.0, latency_s=0.25)
        assert [link.arrival(size, now) for now, size in asked] == pytest.approx(arrivals)
        # A latency delays all bytes, and takes nothing from what the link can carry.
        assert [far.arrival(size, now) for now, size in asked] == pytest.approx([at + 0.25 for at in arrivals])


def test_the_papers_links():
    """OPT-13B has 819,200 bytes of KV a token; 512 tokens take 16.8 ms at 200 Gb/s and 1.4 at 300 GB/s."""
    assert set(LINKS) == set(NAMES)
    assert LimitedLink(LINKS["roce-200g"]).arrival(512 * 819200, 0.0) == pytest.approx(0.0168, rel=0.01)
    assert LimitedLink(LINKS["nvlink"]).arrival(512 * 819200, 0.0) == pytest.approx(0.0014, rel=0.01)


class Limited:
    def __init__(self, bytes_s=100.0, latency_s=0.0):
        self.now, self.under = 0.0, Under()
        self.store = LimitedStore(self.under, LimitedLink(bytes_s, latency_s), 100, lambda: self.now)

    def fetch(self, number, slots=(1,), path="shm", block_bytes=100):
        handle = Handle("s", list(slots), [1] * len(slots), block_bytes)
        return self.store.fetch(Wanted(("leg", number), "p0", path, handle, None))

    def at(self, now):
        self.now = now
        return [fetched.ticket[1] for fetched in self.store.fetched()]


def test_a_take_is_carried_out_when_its_bytes_would_have_come():
    limited = Limited()
    assert limited.store.due() is None
    assert limited.fetch(1) is None and limited.fetch(2, slots=(2, 3)) is None
    assert limited.store.due() == 1.0 and limited.under.asked == []
    assert limited.at(0.99) == [] and limited.under.asked == []
    assert limited.at(1.0) == [1] and limited.store.due() == 3.0
    assert limited.fetch(3) is None  # asked at 1, but the link is busy until 3
    assert limited.at(10.0) == [2, 3] and limited.store.due() is None
    assert limited.under.asked == [1, 2, 3]


def test_what_takes_longer_below_comes_later_and_in_its_own_time():
    limited = Limited()
    limited.fetch(1, path="stream")
    assert limited.at(1.0) == [] and limited.under.asked == [1]
    limited.under.wakes = 5.0
    limited.fetch(2)
    assert limited.store.due() == 2.0
    limited.under.later = [Fetched(("leg", 1), [b"block"])]
    assert limited.at(2.0) == [2, 1] and limited.store.due() == 5.0


def test_what_is_the_workers_own_or_cannot_be_right_does_not_keep_the_link_busy():
    assert Limited(bytes_s=float("inf")).fetch(1).blocks == [b"block"]  # a link of no end answers at once
    limited = Limited()
    limited.fetch(1, slots=[4] * 100_000)
    assert limited.fetch(2, path="local").ticket == ("leg", 2)
    assert limited.fetch(3, block_bytes=1 << 62) is not None
    assert limited.store.due() == 1.0


@pytest.mark.parametrize("seed", range(5))
def test_no_more_comes_than_the_link_carries_and_it_never_idles(seed):
    rng, limited = random.Random(seed), Limited(bytes_s=1000.0)
    sizes, asked, came, now = [], [], [], 0.0
    while len(came) < 300:
        due = limited.store.due()
        asking = now + rng.expovariate(3) if len(asked) < 300 else float("inf")
        if due is not None and due <= asking:
            now = due
            came += [(now, number) for number in limited.at(now)]
        else:
            now = limited.now = asking
            sizes.append(rng.randint(1, 5) * 100)
            asked.append(now)
            limited.fetch(len(asked) - 1, slots=range(sizes[-1] // 100))
    assert [number for _, number in came] == list(range(300)), "in order, each once"
    ends = [0.0, *accumulate(size / 1000 for size in sizes)]
    for first, (start, _) in enumerate(came):
        busy = True  # something was on its way all the time since
        for last in range(first + 1, 300):
            carried = ends[last + 1] - ends[first + 1]
            assert came[last][0] >= start + carried - 1e-9
            busy = busy and asked[last] <= came[last - 1][0]
            if busy:
                assert came[last][0] == pytest.approx(start + carried)
