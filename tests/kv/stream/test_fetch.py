"""What a receiver asks for, in which order, with how much credit, and what it gives up. No sockets, no clock."""

import random

import pytest
import xxhash

from tetri.kv.base import KVCorrupt, KVForeign, KVLost, Wanted, joined, parts
from tetri.kv.stream.fetch import MAX_STARTED, ChunkFetch, Fetching, StreamPatience
from tetri.wire.bulk import MAX_SLOTS, Credit, Gone
from tetri.wire.handover import Handle

BLOCK, MB = 1000, 1 << 20
CREDIT = 4 << 20


def wanted(key="a", index=0, blocks=1, peer="p", segment="s", digest=None, **changed):
    fields = {"segment": segment, "slots": list(range(blocks)), "generations": [1] * blocks, "block_bytes": BLOCK}
    return Wanted((key, index), peer, "stream", Handle(**{**fields, **changed}), digest)


def fetching(buffer=10 * BLOCK, up=True):
    made = Fetching(buffer, CREDIT, StreamPatience(stall_s=5.0, lost_s=15.0))
    made.meet("p", "s")
    if up:
        made.up("p", 0.0)
    return made


def started(made, now=0.0):
    return [fetch.number for _, fetch in made.start(now)]


def asking(*asked, now=0.0, **options):
    """Fetching, and the numbers of those that it starts of what is asked."""
    made = fetching(**options)
    for each in asked:
        assert made.want(each, now) is None
    return made, started(made, now)


def arrive(made, number, data, now=0.0, peer="p"):
    fetch = made.due(peer, number)
    made.came(peer, len(data))
    fetch.add(memoryview(data))
    return made.grew(peer, fetch, now)


def test_what_is_asked_names_its_request_and_grants_credit_that_is_topped_up():
    made = fetching()
    for each in (wanted("a", 0), wanted("b", 0), wanted("a", 1)):
        assert made.want(each, 0.0) is None
    first, second, third = (fetch for _, fetch in made.start(0.0))
    assert [fetch.handle.segment for fetch in (first, second, third)] == ["s"] * 3
    assert first.lane == third.lane != second.lane
    assert first.credit == CREDIT and first.start == 0
    assert made.start(0.0) == []
    made, _ = asking(wanted(blocks=8000), buffer=1 << 40)
    assert made.came("p", 1 << 20) == Credit(credit=CREDIT + (1 << 20))
    assert made.came("p", 1 << 19) is None
    assert made.came("p", 1 << 19) == Credit(credit=CREDIT + (2 << 20))


def test_requests_take_turns_in_getting_memory_and_nobody_is_overtaken_for_ever():
    long = [wanted("long", index, blocks=2) for index in range(3)]
    made, (first, second) = asking(*long, wanted("short"), buffer=4 * BLOCK)
    lanes = {number: made.due("p", number).wanted.ticket[0] for number in (first, second)}
    assert list(lanes.values()) == ["long", "short"]
    made.want(wanted("large", blocks=4), 0.0)
    assert started(made) == []  # the next of "long" waits for memory, and the others behind it
    for number, blocks in ((first, 2), (second, 1)):
        assert arrive(made, number, bytes(blocks * BLOCK))
        assert started(made) == []  # until the engine has used them
    made.used_up(2 * BLOCK)
    assert len(started(made)) == 1
    made.used_up(BLOCK)
    assert started(made) == []  # now it is the turn of "large", which waits for all
    made.used_up(2 * BLOCK)
    (number,) = started(made)
    assert made.due("p", number).wanted.ticket[0] == "large"


def test_so_many_start_at_once_and_one_larger_than_the_memory_alone():
    made, (_,) = asking(wanted(blocks=5), wanted("b"), buffer=BLOCK)
    assert made.used == 5 * BLOCK
    made.used_up(5 * BLOCK)
    assert len(started(made)) == 1
    made, numbers = asking(*(wanted(f"r{index}") for index in range(MAX_STARTED + 5)), buffer=1 << 40)
    assert len(numbers) == MAX_STARTED
    arrive(made, numbers[0], bytes(BLOCK))
    assert len(started(made)) == 1


def test_the_digest_is_over_all_of_it():
    data = bytes(range(250)) * 8
    right, wrong = (wanted(blocks=2, digest=digest) for digest in (xxhash.xxh3_64_intdigest(data), 5))
    made, numbers = asking(right, wrong)
    for number in numbers:
        fetch = made.due("p", number)
        assert not arrive(made, number, data[:700])
        assert arrive(made, number, data[700:])
        assert isinstance(fetch.problem(), KVCorrupt) == (fetch.wanted.digest == 5)
        assert made.due("p", number) is None


@pytest.mark.parametrize("lengths", [[3 * MB], [MB] * 3, [MB + 1, 7, 1, 100_000, 2 * MB], [MB // 3] * 9 + [3]])
@pytest.mark.parametrize("blocks", [1, 2, 3, 128])
def test_the_blocks_are_the_pieces_themselves_cut_where_blocks_end(lengths, blocks):
    data = memoryview(random.Random(1).randbytes(3 * MB))
    fetch = ChunkFetch(wanted(slots=[0] * blocks, block_bytes=3 * MB // blocks), 1, 1)
    at = 0
    for length in lengths:
        fetch.add(data[at : at + length])
        at += len(data[at : at + length])
    size, found = 3 * MB // blocks, fetch.blocks()
    assert [bytes(joined(block)) for block in found] == [data[n * size : (n + 1) * size] for n in range(blocks)]
    whole = [part for block in found for part in parts(block) if part.obj is data.obj]
    assert sum(map(len, whole)) == sum(length for length in lengths if length >= 64 << 10) - max(sum(lengths) - at, 0)


def test_pieces_of_a_byte_each_lie_in_one_memory_and_blocks_of_no_bytes_are_as_many_as_asked():
    assert [ChunkFetch(wanted(blocks=count, block_bytes=0), 1, 1).blocks() for count in (0, 2)] == [(), (b"", b"")]
    assert ChunkFetch(wanted(blocks=0), 1, 1).blocks() == ()
    fetch = ChunkFetch(wanted(blocks=2), 1, 1)
    for at in range(2 * BLOCK):
        fetch.add(memoryview(bytes([at % 251])))
    data = bytes(at % 251 for at in range(2 * BLOCK))
    assert [bytes(block) for block in fetch.blocks()] == [data[:BLOCK], data[BLOCK:]]
    assert all(len([*parts(block)]) == 1 for block in fetch.blocks())


def test_a_new_connection_goes_on_where_the_old_one_was():
    made, (number,) = asking(wanted(blocks=2))
    arrive(made, number, bytes(700))
    made.down("p", 1.0)
    made.want(wanted("b"), 1.0)
    assert started(made, 1.0) == []  # not without a connection
    (again,) = made.up("p", 2.0)
    assert (again.number, again.start, again.credit) == (number, 700, CREDIT)
    assert len(started(made, 2.0)) == 1


def test_what_cannot_be_asked_for_is_never_asked():
    made, forged = fetching(), [{"generations": [1 << 64]}, {"generations": []}, {"block_bytes": 1 << 70}]
    assert isinstance(made.want(wanted(peer="x"), 0.0), KVLost)
    for wrong in ({"segment": "other"}, {"slots": [-1]}, *forged, {"blocks": MAX_SLOTS + 1}):
        assert isinstance(made.want(wanted(**wrong), 0.0), KVForeign)
        assert started(made) == [] and made.deadline() is None


def test_gone_is_lost_or_foreign_and_counts_once():
    made, (first, second) = asking(wanted("a"), wanted("b"))
    fetch, problem = made.gone("p", Gone(number=first, foreign=False, reason="freed\n\x1b"), 0.0)
    assert fetch.number == first and type(problem) is KVLost and str(problem).isprintable()
    assert type(made.gone("p", Gone(number=second, foreign=True, reason=""), 0.0)[1]) is KVForeign
    assert made.gone("p", Gone(number=first, foreign=False, reason=""), 0.0) is None
    assert made.gone("p", Gone(number=99, foreign=False, reason=""), 0.0) is None


def test_another_slab_ends_what_was_asked_of_the_old_one():
    made, (number,) = asking(wanted("a"), wanted("b"), wanted("c"), buffer=BLOCK)
    assert made.meet("p", "s") == []
    lost = made.meet("p", "new")
    assert [fetch.wanted.ticket[0] for fetch in lost] == ["a", "b", "c"]
    assert [fetch.started for fetch in lost] == [True, False, False]
    assert made.due("p", number) is None and made.part("unknown") == [] and started(made) == []
    assert isinstance(made.want(wanted(), 0.0), KVForeign)


def test_silence_means_another_connection_and_without_a_byte_over_any_lost():
    assert fetching().deadline() is None
    made, (number,) = asking(wanted(), now=10.0)
    assert made.deadline() == 15.0 and made.stalled(14.9) == [] and made.stalled(15.0) == ["p"]
    made.down("p", 15.0)
    assert made.deadline() == 25.0
    made.up("p", 16.0)
    assert made.deadline() == 21.0
    arrive(made, number, bytes(10), now=20.0)
    assert made.deadline() == 25.0 and made.lost(34.9) == []
    ((fetch, problem),) = made.lost(35.0)
    assert fetch.number == number and isinstance(problem, KVLost) and made.deadline() is None
    made, _ = asking(wanted())
    for second in range(1, 15):
        made.down("p", float(second))
        made.up("p", second + 0.5)
        assert made.lost(second + 0.6) == []
    assert len(made.lost(15.0)) == 1


def test_who_is_not_reached_or_passed_over_is_lost_in_the_end():
    made, _ = asking(wanted("a"), wanted("b"), now=3.0, up=False)
    assert made.stalled(1e9) == [] and made.deadline() == 18.0
    assert len(made.lost(18.0)) == 2
    made.want(wanted("c"), 100.0)
    assert made.deadline() == 102.0  # it has its own time, and a short one
    made.up("p", 101.0)
    ((_, fetch),) = made.start(101.0)
    arrive(made, fetch.number, bytes(10), now=101.9)
    made.down("p", 102.0)
    assert made.deadline() == 116.9 and made.lost(116.8) == []  # the peer is back
    made, (first, second) = asking(wanted("a"), wanted("b", blocks=4000), buffer=1 << 40)
    lost = []
    for at in range(1, 62):
        arrive(made, second, bytes(10), now=float(at))
        lost += made.lost(float(at))
    assert [fetch.number for fetch, _ in lost] == [first]


def test_waiting_for_memory_is_not_the_peers_silence():
    made, (first,) = asking(wanted("a"), wanted("b"), buffer=BLOCK)
    arrive(made, first, bytes(BLOCK), now=1.0)
    assert made.deadline() is None and made.stalled(1e6) == [] and made.lost(1e6) == []
    made.used_up(BLOCK)
    assert len(started(made, 1000.0)) == 1 and made.deadline() == 1005.0
