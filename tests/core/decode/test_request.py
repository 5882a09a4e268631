"""A request in its decode phase: what follows from its offer, its KV and its tokens."""

import pytest

from tests.core.build import chunk, decode_request, offer


def test_its_receipt_tells_how_its_kv_came():
    made = decode_request(offer("r", 8))
    for index in (0, 1):
        made.flow.announce(chunk("r", index, index, index + 1, token=5 if index else None))
        made.flow.land(index)
    made.preempted, made.recomputed = 2, 8
    receipt = made.receipt("d1")
    assert (receipt.prompt_tokens, receipt.adopted, receipt.local, receipt.kv_bytes, receipt.chunks) == (8, 0, 0, 64, 2)
    assert (receipt.transport, receipt.prefill_instance, receipt.decode_instance) == ("shm", "p1", "d1")
    assert (receipt.preempted, receipt.recomputed, receipt.refetched) == (2, 8, 0)


@pytest.mark.parametrize("recomputed, kept", [(0, 8), (3, 5), (8, 0), (16, 0)])  # again after two preemptions: twice
@pytest.mark.parametrize("stays", [False, True])
def test_each_prompt_token_counts_once_in_its_receipt(stays, recomputed, kept):
    made = decode_request(offer("r", 8))
    made.stays, made.recomputed = stays, recomputed
    receipt = made.receipt("d1")
    assert (receipt.local, receipt.adopted) == ((kept, 0) if stays else (0, kept))
    assert receipt.recomputed == min(recomputed, 8)


def test_no_kv_moves_for_one_that_stays():
    made = decode_request(offer("r", 8))
    made.stays, made.flow.path, made.flow.landed = True, "none", {0: 2}
    receipt = made.receipt("p1")
    assert (receipt.transport, receipt.kv_bytes, receipt.chunks, receipt.refetched) == ("none", 0, 0, 0)
