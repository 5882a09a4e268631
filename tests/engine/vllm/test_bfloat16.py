"""As test_connector.py, in the type of numbers that is served by default. In a file of its own, so that the engines
of the other one are gone."""

from __future__ import annotations

import pytest
from handover import carry_alone, differences

from tetri.request import Sampling

pytestmark = [pytest.mark.model, pytest.mark.timeout(400)]

GREEDY = Sampling(max_tokens=8, ignore_eos=True)


def test_one_at_a_time_bfloat16(bfloat16, prompts):
    for number, prompt in enumerate(prompts):
        text = bfloat16.reference.generate(prompt, GREEDY, ())
        request = carry_alone(bfloat16, f"alone-{number}", prompt, GREEDY)
        assert not differences(text, request)
