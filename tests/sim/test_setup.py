"""What a setup may be."""

from dataclasses import replace

import pytest

from tetri.cost import Cost
from tetri.policy.rules import Rules
from tetri.sim.setup import Setup, SimError

SETUP = Setup(Cost(kv_token_bytes=1000), kv_tokens=16_000, chunk_tokens=512)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prefill": 0}, "there is no prefill instance"),
        ({"decode": 0}, "there is no decode instance"),
        ({"prefill": -1}, "prefill must be at least 0, got -1"),
        ({"kv_tokens": 5}, "the KV of an instance holds 5 tokens"),
        ({"kv_tokens": 0}, "the KV of an instance holds 0 tokens"),
        ({"max_batch": 0}, "max_batch must be at least 1"),
        ({"max_batch": 512}, "max_batch must be below chunk_tokens"),
        ({"link_bytes_s": 0.0}, "link_bytes_s must be above 0"),
        ({"link_bytes_s": float("nan")}, "link_bytes_s must be above 0"),
        ({"link_latency_s": float("inf")}, "link_latency_s must be at least 0"),
        ({"reserve_share": 0.0}, "reserve_share must be above 0"),
        ({"transfer": "never"}, "unknown transfer 'never'; known: chunk, request"),
        ({"flip": "x"}, "unknown flip 'x'; known: none"),
        ({"slots": 3}, "slots must be at least"),
        ({"rules": Rules(order="x")}, "unknown order 'x'; known: adaptive, fcfs"),
    ],
)
def test_a_wrong_setup_is_one_line(changes, says):
    with pytest.raises(SimError) as error:
        replace(SETUP, **changes).check()
    assert says in str(error.value) and "\n" not in str(error.value)


def test_what_is_not_given_is_as_in_the_cost_table():
    made = Setup(Cost(kv_tokens=1000, chunk_tokens=300)).capacity()
    assert (made.blocks, made.block_tokens, made.chunk_tokens, made.context) == (62, 16, 300, 62 * 16)
    made = SETUP.capacity()
    assert (made.blocks, made.chunk_tokens, made.context) == (1000, 512, 16_000)
