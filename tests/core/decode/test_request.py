"""A request in its decode phase: what follows from its offer, its KV and its tokens."""

from tests.core.build import chunk, decode_request, offer


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
