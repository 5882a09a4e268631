"""What an instance is."""

import pytest

from tests.core.build import capacity, identity


@pytest.mark.parametrize("slots, chunk_tokens, open_slots", [(8, 8, 5), (8, 9, 5), (8, 10, 4), (3, 8, 0), (1, 8, 0)])
def test_what_one_chunk_may_fill_is_kept_for_requests_that_were_granted(slots, chunk_tokens, open_slots):
    """A chunk may begin and end within a block: of 4 tokens here."""
    made = identity("p1", "prefill", slots=slots, capacity=capacity(chunk_tokens=chunk_tokens))
    assert made.open_slots == open_slots


@pytest.mark.parametrize("load_s, offer_s, look_s, renew_s", [(0.1, 1.0, 1.0, 10.0), (1.0, 0.01, 0.1, 0.1)])
def test_a_deferred_offer_is_looked_at_in_time_to_renew_it(load_s, offer_s, look_s, renew_s):
    made = identity("p1", "prefill", load_s=load_s, offer_s=offer_s)
    assert (made.look_s, made.renew_s) == pytest.approx((look_s, renew_s))
