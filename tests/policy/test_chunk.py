"""How prompts are cut into chunks."""

from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tetri.cost import Cost
from tetri.engine_request import Span
from tetri.policy.chunk import ALIKE, SIZES, WAIT, limit, pack
from tetri.policy.views import MixedStep, Progress

# A step of n tokens takes 0.1 s and n ms up to 512 tokens, twice as long for each token beyond; 10 decodes add 0.05 s.
COST = Cost(prefill=((0.0, 0.1), (512.0, 0.612), (1024.0, 1.636)), decode=((1.0, 0.1), (11.0, 0.155)))


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30)), max_size=8), st.integers(1, 40))
def test_chunks_are_full_in_order_and_cut_only_at_their_end(sizes, chunk_tokens):
    prompts = [Progress(str(number), done, done + more) for number, (done, more) in enumerate(sizes)]
    spans = pack(prompts, chunk_tokens)
    assert sum(span.stop - span.start for span in spans) == min(chunk_tokens, sum(more for _, more in sizes))
    assert [span.key for span in spans] == [prompt.key for prompt in prompts[: len(spans)]]
    for span, prompt in zip(spans, prompts, strict=False):
        assert span.start == prompt.done < span.stop <= prompt.goal
        assert span.stop == prompt.goal or span is spans[-1]


def beside(slack_s=inf, batch=0, pressed=False, most=2048, start=0, ends=(), cost=COST):
    return limit(MixedStep(batch, 0, slack_s, pressed, start, ends), cost, most)


@pytest.mark.parametrize(
    "step, right",
    [
        ({}, 512),  # without decodes: the best rate, 1.20 ms a token
        ({"most": 300}, 300),
        ({"most": 100}, 100),
        ({"batch": 11}, 512),  # they spare 0.155 s of it: 1 ms a token up to 512 tokens
        ({"batch": 11, "slack_s": 9.0}, 512),
        ({"batch": 11, "pressed": True}, 512),  # 1.30 ms a token of the whole step
        ({"slack_s": 0.5}, 384),  # 0.484 s
        ({"slack_s": 0.5, "batch": 11}, 256),  # 0.055 s for the decodes, beside the fixed 0.1 s
        ({"slack_s": 0.05}, 0),
        ({"most": 0}, 0),
        ({"most": -3, "batch": 11}, 0),
        ({"slack_s": -3.0}, 0),
    ],
)
def test_as_large_as_the_slack_of_the_decodes_allows(step, right):
    assert beside(**step) == right


BENT = Cost(((0.0, 0.1), (128.0, 0.228), (512.0, 0.804)), COST.decode)  # 1 ms a token up to 128 tokens, then 1.5


def test_decodes_need_a_step_anyway_so_for_them_only_what_a_chunk_adds_counts():
    """A whole step is cheapest with many tokens, what a chunk adds to it with few. The prompt waits for a whole step:
    that outweighs one decode, and not eleven, until prompts are nearly late."""
    steps = ({}, {"batch": 1}, {"batch": 11}, {"batch": 11, "pressed": True})
    assert [beside(most=512, cost=BENT, **step) for step in steps] == [512, 512, 128, 512]


def test_of_chunks_that_cost_alike_the_largest():
    alike = Cost(((0.0, 0.1), (128.0, 0.228), (512.0, 0.650)), COST.decode)  # 1 ms a token, then 1.1: 1.075 for all
    assert beside(batch=11, most=512, cost=alike) == 512


def test_where_a_small_chunk_adds_nothing_to_a_step_larger_ones_run_too():
    """Up to 64 tokens a step takes as long as without them, then 1 ms longer for each. Alone a token costs 1.03 ms."""
    free = Cost(((0.0, 0.1), (64.0, 0.1), (2048.0, 2.084)), COST.decode)
    assert beside(batch=11, cost=free) == 128  # 0.52 ms for each of 128 tokens, 0.68 for each of 192
    assert beside(batch=11, pressed=True, cost=free) == 2048


@pytest.mark.parametrize("ends, right", [((200,), 200), ((100, 150, 900), 150), ((300,), 128), ((2000,), 128)])
def test_a_chunk_that_ends_a_prompt_may_cost_more(ends, right):
    """128 tokens cost 1.02 ms each, 200 tokens 1.19 and 300 tokens 1.30: then the next step takes the rest of it."""
    assert beside(batch=11, most=512, ends=ends, cost=BENT) == right


def test_a_chunk_far_inside_its_prompt_takes_longer():
    deep = Cost(COST.prefill, COST.decode, prefill_start_s=1e-6)
    assert [beside(0.5, start=start, cost=deep) for start in (0, 1000, 10_000)] == [384, 192, 32]


def test_without_a_cost_table_chunks_are_whole():
    assert [beside(slack_s, batch=3, cost=Cost(), most=700) for slack_s in (inf, 0.1)] == [700, 700]


@settings(deadline=None, derandomize=True)
@given(st.floats(-1.0, 3.0), st.integers(0, 11), st.booleans(), st.integers(1, 3000))
def test_within_the_slack_no_chunk_is_much_cheaper_and_no_larger_one_as_cheap(slack_s, batch, pressed, most):
    decode_s = 0.0 if pressed else batch**2 / (batch**2 + WAIT) * COST.decode_s(batch, 0)
    cost_s = {}
    for size in (*(size for size in SIZES if size < most), most):
        seconds = COST.step_s((Span("", 0, size),), batch, 0)
        if seconds <= slack_s:
            cost_s[size] = (seconds - decode_s) / size
    chosen = beside(slack_s, batch, pressed, most)
    assert chosen in cost_s or (chosen == 0 and not cost_s)
    assert all(cost_s[chosen] <= ALIKE * each for size, each in cost_s.items() if size < chosen)  # above FLOOR here
    assert all(each > min(cost_s.values()) for size, each in cost_s.items() if size > chosen)
