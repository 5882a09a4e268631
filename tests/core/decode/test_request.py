"""A request in its decode phase: what follows from its offer, its KV and its tokens."""

import pytest

from tests.core.build import chunk, decode_request, drop, offer


@pytest.mark.parametrize(
    "other, same",
    [({}, True), ({"src": "p2"}, False), ({"incarnation": 2}, False), ({"attempt": 2}, False), ({"offer": 2}, False)],
)
def test_a_message_speaks_of_the_very_offer_that_was_granted(other, same):
    made = decode_request(offer("r", 8))
    assert made.is_for(drop("r", **other)) == same and not made.is_for(drop("x", **other))


def test_its_receipt_tells_how_its_kv_came():
    made = decode_request(offer("r", 8))
    for index in (0, 1):
        made.flow.announce(chunk("r", index, index, index + 1, token=5 if index else None))
        made.flow.land(index)
    made.preempted, made.recomputed = 2, 8
    receipt = made.receipt("d1")
    assert (receipt.prompt_tokens, receipt.adopted, receipt.kv_bytes, receipt.chunks) == (8, 8, 64, 2)
    assert (receipt.transport, receipt.prefill_instance, receipt.decode_instance) == ("shm", "p1", "d1")
    assert (receipt.preempted, receipt.recomputed, receipt.refetched) == (2, 8, 0)
