"""Far more requests than the decode instances have memory for: what each costs the deployment in messages."""

from collections import Counter

from tetri.cost import Cost
from tetri.sim.links import Port
from tetri.sim.setup import Setup
from tetri.sim.traces import TokenCounts, drawn
from tetri.sim.world import World
from tetri.wire.handover import Chunk, Offer

COUNT = 300
COST = Cost(prefill=((1.0, 0.02), (512.0, 0.05)), decode=((1.0, 0.02), (16.0, 0.03)), kv_token_bytes=1000)
MANY = Setup(COST, prefill=8, decode=8, kv_tokens=4_000, chunk_tokens=256, max_batch=64, slots=200)


def test_a_request_that_waits_for_memory_costs_few_offers_and_announcements(monkeypatch):
    """They come within three seconds, and take 14 on the average. When each was offered again with every view, with all
    its chunks, that were 20 offers a request and 23 announcements a chunk."""
    offers, announced, send = Counter(), Counter(), Port.send

    def counted(port, peer, message):
        if isinstance(message, Offer):
            offers[message.rid] += 1
        elif isinstance(message, Chunk):
            announced[message.rid, message.attempt, message.index] += 1
        send(port, peer, message)

    monkeypatch.setattr(Port, "send", counted)
    lengths = (TokenCounts.parsed(text) for text in ("100-1000", "50-300"))
    outcomes = World(MANY, drawn(COUNT, *lengths, seed=1, rate=COUNT / 3)).run().outcomes
    assert [outcome.state for outcome in outcomes] == ["done"] * COUNT
    assert offers.total() <= 1.2 * COUNT and max(offers.values()) <= 3
    assert announced.total() <= 1.1 * len(announced)
