"""Chunks on their way, seen from both sides."""

from tests.core.build import chunk, handle
from tetri.core.prefill.request import KVChunk, KVInflow, KVOutflow


def kv_chunk(index, start, stop):
    return KVChunk(index, start, stop, handle(*range(start, stop)), 9, None)


def test_what_was_put_lands_once_and_is_complete_in_the_end():
    flow = KVOutflow(3)
    flow.aim(1, "d1")
    flow.put(kv_chunk(0, 0, 2))
    flow.put(kv_chunk(1, 2, 3))
    assert flow.movable and not flow.granted
    assert flow.land(1) == handle(2) and flow.land(1) is None and flow.land(7) is None
    assert not flow.movable and not flow.complete and flow.granted
    assert flow.land(0) == handle(0, 1) and flow.complete
    assert [each.index for each in flow.sent] == [0, 1]


def test_aiming_elsewhere_asks_anew():
    flow = KVOutflow(1)
    flow.aim(1, "d1")
    flow.granted = True
    flow.clear_aim()
    assert (flow.offer, flow.target, flow.granted) == (None, "", False)
    flow.aim(2, "d2")
    assert (flow.offer, flow.target, flow.granted) == (2, "d2", False)


def test_giving_up_returns_what_is_still_here():
    flow = KVOutflow(3)
    flow.put(kv_chunk(0, 0, 2))
    flow.put(kv_chunk(1, 2, 3))
    flow.land(0)
    assert flow.drain() == [handle(2)] and not flow.in_flight


def test_the_token_comes_with_the_last_chunk_whichever_comes_first():
    flow = KVInflow(2, "shm", "s-p1")
    flow.announce(chunk("r", 1, 1, 2, token=5))
    flow.land(1)
    assert flow.token == 5 and not flow.complete
    flow.announce(chunk("r", 0, 0, 1))
    flow.land(0)
    assert flow.complete and flow.bytes == 64


def test_all_blocks_without_the_token_are_not_complete():
    flow = KVInflow(1, "shm", "s-p1")
    flow.announce(chunk("r", 0, 0, 1))
    flow.land(0)
    assert not flow.complete


def test_a_chunk_must_be_one_of_its_prompt():
    flow = KVInflow(4, "shm", "s-p1")
    first, last = chunk("r", 0, 0, 2), chunk("r", 1, 2, 4, token=7)
    assert flow.obstacle(first) is None
    flow.announce(first)
    for wrong, word in (
        (chunk("r", 1, 0, 2), "misfit"),  # over the first
        (chunk("r", 1, 1, 3), "misfit"),
        (chunk("r", 1, 2, 3, token=7), "misfit"),  # not the last
        (chunk("r", 1, 2, 4), "misfit"),  # the last without the first token
        (chunk("r", 1, 3, 5, token=7), "misfit"),
        (chunk("r", 1, 3, 3), "misfit"),
        (chunk("r", 1, 2, 4, token=7, handle=handle(2, 3, 4)), "misfit"),
        (chunk("r", 1, 2, 4, token=7, handle=handle(2)), "truncated"),
        (chunk("r", 1, 2, 4, token=7, handle=handle(2, 3, segment="s-p2")), "foreign"),
    ):
        assert flow.obstacle(wrong)[0] == word
    assert flow.obstacle(last) is None
    flow.land(0)
    assert flow.obstacle(chunk("r", 1, 0, 2))[0] == "misfit" and flow.obstacle(last) is None
