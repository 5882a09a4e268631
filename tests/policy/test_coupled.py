"""What a coupled engine runs next."""

import pytest

from tetri.engine_request import Span
from tetri.policy.coupled import COUPLED, CoupledLimits, CoupledView, Iteration, chunked, preempted, prefill_first
from tetri.policy.views import Progress

LIMITS = CoupledLimits(slots=4, step_tokens=100, kv_tokens=1000)


def view(*prompts, started=None, decoding=0, free=1000):
    return CoupledView(started, [Progress(str(i), 0, tokens) for i, tokens in enumerate(prompts)], decoding, free)


def spans(*tokens):
    return tuple(Span(str(i), 0, count) for i, count in enumerate(tokens))


@pytest.mark.parametrize("rule", COUPLED)
def test_no_prompt_starts_without_a_slot_and_memory_for_all_of_it(rule):
    for prompts, more in (([], {"decoding": 3}), ([10], {"decoding": 4}), ([50], {"decoding": 1, "free": 50})):
        assert COUPLED[rule](view(*prompts, **more), LIMITS) == Iteration((), True)
    assert COUPLED[rule](view(10, 10, decoding=3), LIMITS).spans == spans(10)
    assert COUPLED[rule](view(50, 30, decoding=1, free=60), LIMITS).spans == spans(50)


def test_prefill_first_takes_whole_prompts_while_the_decodes_stall_and_one_beyond_the_budget_alone():
    assert prefill_first(view(40, 50, 20, decoding=1), LIMITS) == Iteration(spans(40, 50), False)
    assert prefill_first(view(300, 10), LIMITS) == Iteration(spans(300), False)
    assert prefill_first(view(10, 300), LIMITS).spans == spans(10)


def test_chunked_gives_decodes_their_token_and_cuts_prompts_at_the_budget_the_started_one_first():
    assert chunked(view(40, 90, decoding=2), LIMITS) == Iteration((Span("0", 0, 40), Span("1", 0, 58)), True)
    started = Progress("started", 60, 90)
    both = (Span("started", 60, 90), Span("0", 0, 68))
    assert chunked(view(500, started=started, decoding=2, free=600), LIMITS).spans == both
    assert chunked(view(10, started=started, decoding=3), LIMITS).spans == (Span("started", 60, 90),)  # no slot
    limits = CoupledLimits(slots=200, step_tokens=100, kv_tokens=1000)
    assert chunked(view(10, started=Progress("started", 1, 9), decoding=100), limits) == Iteration((), True)


def test_the_youngest_give_way_until_each_has_a_token():
    cases = [([10, 10], 2, 0), ([10, 10], 1, 1), ([10, 20, 3], 0, 1), ([10, 2, 0], 0, 2), ([10], 0, 0), ([], 0, 0)]
    assert [preempted(held, free) for held, free, _ in cases] == [out for *_, out in cases]
