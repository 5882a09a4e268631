"""What goes next out of a slab that several receivers read: order, turns, credit, bounds. No sockets."""

import random
from functools import partial

import pytest

from tetri.kv.local import LocalSlab
from tetri.kv.slab import shape_problem
from tetri.kv.stream.serve import MAX_FETCHES, MAX_PEERS, SMALL_BLOCK, Serving, cut, spans
from tetri.wire.bulk import LEAST_COST, PIECE_BYTES, Credit, Fetch, cost
from tetri.wire.handover import Handle

MB = 1 << 20
ENDLESS = 1 << 60


def handle(slots, block_bytes=MB, segment="s"):
    return Handle(segment=segment, slots=slots, generations=[1] * len(slots), block_bytes=block_bytes)


def fetch(number, slots, lane=None, start=0, credit=ENDLESS, block_bytes=MB, segment="s"):
    lane = number if lane is None else lane
    return Fetch(number=number, lane=lane, handle=handle(slots, block_bytes, segment), start=start, credit=credit)


def serving(*fetches):
    """With these fetches of one receiver."""
    made = Serving(lambda handle: None if handle.segment == "s" else "another slab")
    assert [made.received(b"d", each) for each in fetches] == [None] * len(fetches)
    return made


def sent(made, most=10_000):
    """(peer, number, start, stop) of all that may go now."""
    found = []
    while len(found) < most and (due := made.next()) is not None:
        made.sent(due)
        found.append((due.peer, due.number, due.start, due.stop))
    return found


def test_one_fetch_goes_in_order_and_once_each_piece_with_the_slots_that_it_touches():
    made = serving(fetch(1, [3, 7], block_bytes=3 * MB // 2))
    half = MB // 2
    expected = [(0, 2 * half), (2 * half, 3 * half), (3 * half, 5 * half), (5 * half, 6 * half)]
    assert sent(made) == [(b"d", 1, *each) for each in expected]
    assert made.fetches == 0 and made.next() is None
    made = serving(fetch(1, [4, 2], block_bytes=1_500_000))
    touched = []
    while (due := made.next()) is not None:
        made.sent(due)
        touched.append(due.slots.slots)
    assert touched == [[4], [4], [2], [2]]


@pytest.mark.parametrize("others", [[b"d"], [b"a", b"b", b"c"]], ids=["request", "receiver"])
def test_a_small_one_waits_for_one_piece_of_each_other(others):
    made = serving()
    for peer in others:
        for number in range(3):
            made.received(peer, fetch(number, list(range(50))))
    sent(made, 10)
    made.received(b"d", fetch(9, [0]))
    assert (b"d", 9, 0, MB) in sent(made, 4)


def test_the_fetches_of_one_request_go_one_after_the_other():
    made = serving(*(fetch(number, [0, 1], lane=1) for number in (1, 2, 3)), fetch(4, [0, 1, 2], lane=4))
    numbers = [number for _, number, _, _ in sent(made)]
    assert numbers == [1, 4, 1, 4, 2, 4, 2, 3, 3]


def test_never_more_goes_than_was_granted_and_the_rest_when_it_is():
    made = serving(fetch(1, list(range(8)), credit=3 * MB + MB // 2))
    made.received(b"e", fetch(1, [0], credit=0))
    made.received(b"d", Credit(credit=MB))  # an older one counts for nothing
    assert [stop for *_, stop in sent(made)] == [MB, 2 * MB, 3 * MB]
    made.received(b"d", Credit(credit=4 * MB))
    assert [stop for *_, stop in sent(made)] == [4 * MB]
    made.received(b"e", Credit(credit=MB))
    assert sent(made) == [(b"e", 1, 0, MB)]


@pytest.mark.parametrize("seed", range(5))
def test_credit_and_order_hold_in_any_history(seed):
    rng, made = random.Random(seed), serving()
    granted, gone, progress, sizes = {}, {}, {}, {}
    for number in range(400):
        peer = rng.choice([b"a", b"b", b"c"])
        granted[peer] = granted.get(peer, 0) + rng.choice([0, 0, MB // 3, 2 * MB])
        if rng.random() < 0.5:
            made.received(peer, Credit(credit=granted[peer]))
        else:
            slots = rng.sample(range(64), rng.randint(0, 5))
            size = rng.choice([100, SMALL_BLOCK - 1, SMALL_BLOCK, 700_000, 3 * MB])
            asked = fetch(number, slots, rng.randint(0, 3), credit=granted[peer], block_bytes=size)
            assert made.received(peer, asked) is None
            sizes[peer, number] = len(slots) * size
            progress[peer, number] = 0
        for who, fetched, start, stop in sent(made, rng.randint(0, 4)):
            assert start == progress[who, fetched] and stop - start <= PIECE_BYTES
            progress[who, fetched] = stop
            gone[who] = gone.get(who, 0) + cost(stop - start)
            assert gone[who] <= granted[who]
    for peer in granted:
        made.received(peer, Credit(credit=ENDLESS))
    for who, fetched, start, stop in sent(made):
        assert start == progress[who, fetched]
        progress[who, fetched] = stop
    assert progress == sizes and made.fetches == 0


def test_what_cannot_be_served_is_answered_at_once():
    made, ended = serving(), [fetch(1, [0, 1], start=2 * MB), fetch(1, [0, 1], start=3 * MB), fetch(1, [], start=1)]
    for asked in (fetch(1, [], segment="t"), *ended):
        answer = made.received(b"d", asked)
        assert (answer.number, answer.foreign) == (1, asked not in ended)
        assert answer.reason.startswith("another slab") or "nothing is left" in answer.reason and asked in ended
        assert made.next() is None and made.fetches == 0
    slab = LocalSlab("p0", 4, MB, {})
    mine, _ = slab.put(2, lambda views: None)
    made = Serving(partial(shape_problem, slab.segment))
    assert made.received(b"d", Fetch(number=1, lane=1, handle=mine, start=0, credit=0)) is None
    assert made.received(b"d", fetch(2, [0])).foreign


def test_no_bytes_are_one_empty_piece_a_fetch_goes_on_where_it_was_and_what_was_freed_ends_alone():
    made = serving(fetch(1, []), fetch(2, [4, 9, 3], start=MB))
    assert sent(made) == [(b"d", 1, 0, 0), (b"d", 2, MB, 2 * MB), (b"d", 2, 2 * MB, 3 * MB)]
    made = serving(fetch(1, [0, 1], lane=1), fetch(2, [2], lane=1))
    answer = made.gone(made.next())
    assert (answer.number, answer.foreign) == (1, False)
    assert sent(made) == [(b"d", 2, 0, MB)]


def test_a_receiver_that_is_full_or_gone_keeps_nobody_waiting():
    made = serving()
    for peer in (b"a", b"b"):
        made.received(peer, fetch(1, [0, 1]))
    made.full(made.next().peer)
    assert {peer for peer, *_ in sent(made)} == {b"b"}
    made.received(b"a", Credit(credit=ENDLESS))
    made.forget(made.next().peer)
    made.forget(b"a")
    assert sent(made) == [] and made.peers == [b"b"]


def test_nothing_grows_without_bound():
    made = serving(*(fetch(number, [0], credit=0) for number in range(MAX_FETCHES)))
    assert "fetches" in made.received(b"d", fetch(MAX_FETCHES, [0], credit=0)).reason
    for number in range(MAX_PEERS - 1):
        made.received(b"%d" % number, Credit(credit=0))
    assert "receivers" in made.received(b"one more", fetch(1, [0])).reason
    assert made.received(b"one more", Credit(credit=0)) is None and len(made.peers) == MAX_PEERS
    tiny = serving(*(fetch(number, [0], credit=3 * LEAST_COST, block_bytes=1) for number in range(10)))
    assert len(sent(tiny)) == 3, "a tiny piece costs enough to bound their number"


def test_pieces_stop_where_the_memory_does_and_small_blocks_are_joined():
    large = handle([5, 6, 7, 3], 400_000)
    assert (cut(large, 0), cut(large, MB), cut(large, 1_200_000)) == (MB, 1_200_000, 1_600_000)
    assert list(spans(large, 0, MB)) == [(5 * 400_000, MB)]
    assert list(spans(large, 1_100_000, 1_300_000)) == [(5 * 400_000 + 1_100_000, 100_000), (1_200_000, 100_000)]
    small = handle([5, 9, 1], 1000)
    assert cut(small, 0) == 3000 and list(spans(small, 0, 3000)) == [(5000, 1000), (9000, 1000), (1000, 1000)]
    assert list(spans(small, 0, 0)) == []
