"""As test_connector.py, in the type of numbers that is served by default, with both phases in one engine. In a file of
its own, so that the engines of the other one are gone."""

from __future__ import annotations

import contextlib

import pytest
from handover import Engines, carry_alone, differences
from plain import Plain
from vllm_process import EngineProcess, arguments

from tetri.request import Sampling

pytestmark = [pytest.mark.model, pytest.mark.timeout(400)]

GREEDY = Sampling(max_tokens=8, ignore_eos=True)


def test_one_at_a_time_bfloat16(model, prompts, tmp_path):
    with (
        contextlib.closing(EngineProcess("tetri", **arguments(model, "bfloat16", 60))) as engine,
        contextlib.closing(Plain(tmp_path, **arguments(model, "bfloat16", 20, max_batch=4))) as plain,
    ):
        engines = Engines(plain, engine, engine)
        for number, prompt in enumerate(prompts):
            request = carry_alone(engines, f"{number}", prompt, GREEDY)
            assert not differences(plain.generate(prompt, GREEDY), request)
