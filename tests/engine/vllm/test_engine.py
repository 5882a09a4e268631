"""What a leg may be, what a step reports, and that a cancel gives back every block in any state."""

from __future__ import annotations

import pytest
from handover import BLOCK, TEXT, TOKENS, Pair, Request, adopt_zeros, engine_request
from vllm_process import BLOCK_BYTES, CONTEXT, arguments

from tetri.engine.base import EngineError, Span, StepDone
from tetri.engine.vllm.engine import VllmEngine
from tetri.request import Sampling

pytestmark = [pytest.mark.model, pytest.mark.timeout(400)]


# ---------------------------------------------------------------- what the engine is


def test_facts(engine):
    fingerprint, capacity, block_bytes, stop_ids = engine.facts()
    assert block_bytes == fingerprint.block_bytes == BLOCK_BYTES["float32"]
    assert (fingerprint.engine, fingerprint.dtype, fingerprint.kv_dtype) == ("vllm", "float32", "float32")
    assert (fingerprint.layers, fingerprint.kv_heads, fingerprint.head_dim) == (30, 3, 64)
    assert fingerprint.version and "/" in fingerprint.isa
    assert (capacity.blocks, capacity.context) == (180, CONTEXT)  # vLLM keeps one of 181, the null block
    assert stop_ids == (2,)


def test_layouts_that_cannot_be_moved_are_refused_by_name(engine):
    groups, window, unified = engine.refused_layouts()
    assert "2 KV cache groups" in groups
    assert "SlidingWindowSpec" in window
    assert "sliding window" in unified
    assert all(text.startswith("unsupported KV layout") and "\n" not in text for text in (groups, window, unified))


def test_one_engine_per_process(engine, model):
    with pytest.raises(EngineError, match="already runs a vLLM engine"):
        engine.start_another(arguments(model, "float32", 20))


def test_what_is_wrong_without_loading_anything(model, tmp_path):
    fine = arguments(model, "float32", 20)
    for change, why in (
        ({"model": tmp_path / "nowhere"}, "unknown model"),
        ({"dtype": "float16"}, "dtype must be one of bfloat16, float32"),
        ({"chunk_tokens": 16}, "larger than max_batch"),
        ({"block_tokens": 100}, "multiple of 32"),
        ({"context": 1}, "context must be at least 2"),
        ({"max_batch": 0}, "max_batch must be at least 1"),
    ):
        with pytest.raises(EngineError, match=why):
            VllmEngine(**fine | change)


def test_what_vllm_refuses_is_one_line(model, tmp_path):
    """The engine that lacks its weights comes last: it has begun to start."""
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    least = (CONTEXT // BLOCK + 1) * BLOCK_BYTES["float32"]
    fine = arguments(model, "float32", 20)
    changes = {
        f"must be at least {least}$": {"kv_bytes": least - 1},
        "greater than the derived max_model_len": {"context": 9000},
        "Cannot find any model weights": {"model": tmp_path},
    }
    for why, change in changes.items():
        with pytest.raises(EngineError, match=why) as caught:
            VllmEngine(**fine | change)
        assert "\n" not in str(caught.value) and "VLLM_" not in str(caught.value)


# ---------------------------------------------------------------- steps


def test_a_chunk_holds_a_tail_and_heads_and_the_order_is_kept(engine):
    for key, count in (("a", 700), ("b", 200), ("c", 300)):
        engine.add(engine_request(key, "prefill", TOKENS[:count]))
    first, second, third = engine.step(), engine.step(), engine.step()
    assert first.spans == (Span("a", 0, 512),)
    assert second.spans == (Span("a", 512, 700), Span("b", 0, 200), Span("c", 0, 124))
    assert third.spans == (Span("c", 124, 300),)
    assert [token.key for token in (*first.tokens, *second.tokens, *third.tokens)] == ["a", "b", "c"]
    assert all(token.reason is None for token in second.tokens)
    assert dict(first.held) == {"a": 4} and dict(second.held) == {"c": 1}


def test_nothing_to_do(engine):
    assert engine.step().spans == ()
    engine.add(engine_request("parked", "decode"))
    done = engine.step()
    assert (done.allocated, done.held) == (("parked",), (("parked", 6),))
    for _ in range(3):
        assert engine.step() == StepDone()
    engine.cancel("parked")


def test_both_phases_in_one_engine(float32, engine):
    """A prefill leg joins the steps of a decode leg, and its KV can be adopted without leaving the engine."""
    reference = float32.reference.generate(list(TOKENS), TEXT, float32.stop_ids)
    engine.add(engine_request("here", "prefill"))
    engine.add(engine_request("there", "decode"))
    done = engine.step()
    assert done.allocated == ("there",) and done.spans == (Span("here", 0, 512),)  # blocks cost no tokens
    (first,) = engine.step().tokens
    engine.adopt("there", 0, engine.export("here", 0, 6))
    engine.admit("there", first.token)
    engine.add(engine_request("next", "prefill", TOKENS[:600]))
    done = engine.step()
    assert done.spans == (Span("there", 700, 701), Span("next", 0, 511))  # the decode token is part of the budget
    ids = [first.token]
    while not any(token.key == "there" and token.reason for token in done.tokens):
        ids += [token.token for token in done.tokens if token.key == "there"]
        done = engine.step()
    ids += [token.token for token in done.tokens if token.key == "there"]
    assert ids == reference.ids


def test_a_prefill_leg_says_whether_the_request_ended(engine):
    engine.add(engine_request("one", "prefill", sampling=Sampling(max_tokens=1, ignore_eos=True)))
    engine.add(engine_request("more", "prefill", TOKENS[:30]))
    found = {}
    while len(found) < 2:
        found |= {token.key: token.reason for token in engine.step().tokens}
    assert found == {"one": "length", "more": None}


def test_end_of_sequence(float32, engine):
    """min_tokens forbids the end; without it a leg ends with "stop" where the model says so."""
    # A repetition penalty below 1 pulls tokens of the prompt: the end of sequence becomes the best choice.
    prompt = [2] * 40
    pulled = Sampling(max_tokens=8, repetition_penalty=0.01)
    request = Request("stop", prompt, pulled)
    Pair(float32.prefill, engine).carry(request)
    assert (request.ids, request.reason) == ([2], "stop")
    request = Request("ignored", prompt, Sampling(max_tokens=8, repetition_penalty=0.01, ignore_eos=True))
    Pair(float32.prefill, engine).carry(request)
    assert (request.ids, request.reason) == ([2] * 8, "length")
    least = Sampling(max_tokens=8, repetition_penalty=0.01, min_tokens=4)
    request = Request("least", prompt, least)
    Pair(float32.prefill, engine).carry(request)
    assert 2 not in request.ids[:4] and len(request.ids) > 4


# ---------------------------------------------------------------- what is refused


BAD = {
    "empty": (engine_request("bad", "prefill", ()), "at least one token"),
    "vocabulary": (engine_request("bad", "prefill", (1, 49152)), "0 to 49151"),
    "negative": (engine_request("bad", "decode", (1, -1)), "0 to 49151"),
    "context": (engine_request("bad", "prefill", [1] * CONTEXT), "exceed the context"),
    "output": (engine_request("bad", "decode", [1] * (CONTEXT - 5)), "exceed the context"),
    "max_tokens": (engine_request("bad", "prefill", sampling=Sampling(max_tokens=0)), "max_tokens must be at least 1"),
    "used up": (engine_request("bad", "prefill", TOKENS, output_from=694), "leaves nothing to compute"),
    "nothing after the first": (engine_request("bad", "decode", TOKENS, output_from=695), "leaves nothing to compute"),
    "output_from": (engine_request("bad", "prefill", TOKENS, output_from=701), "output_from must be from 0 to 700"),
    "no seed": (engine_request("bad", "prefill", sampling=Sampling(temperature=0.5)), "needs a seed"),
    "top_p": (engine_request("bad", "prefill", sampling=Sampling(top_p=0.0)), "top_p must be above 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_leg_that_cannot_run_is_refused_and_nothing_else_happens(engine, name):
    bad, why = BAD[name]
    with pytest.raises(EngineError, match=why) as caught:
        engine.add(bad)
    assert "\n" not in str(caught.value)
    assert engine.step().spans == ()


def test_the_longest_leg_that_fits_runs(engine):
    engine.add(engine_request("longest", "prefill", [7] * (CONTEXT - 1), Sampling(max_tokens=1)))
    spans = []
    while not (done := engine.step()).tokens:
        spans += done.spans
    assert done.spans[-1].stop == CONTEXT - 1 and done.tokens[0].reason in ("length", "stop")


def test_wrong_order_is_refused(engine):
    with pytest.raises(EngineError, match="does not wait for admission"):
        engine.admit("nobody", 5)
    with pytest.raises(EngineError, match="no blocks that wait"):
        engine.adopt("nobody", 0, [])
    engine.add(engine_request("early", "decode"))
    with pytest.raises(EngineError, match="does not wait for admission"):
        engine.admit("early", 5)
    with pytest.raises(EngineError, match="already there"):
        engine.add(engine_request("early", "decode"))
    engine.step()
    with pytest.raises(EngineError, match="6 of its blocks were not adopted"):
        engine.admit("early", 5)
    with pytest.raises(EngineError, match="has 6 blocks"):
        engine.adopt("early", 6, [bytes(engine.facts()[2])])
    with pytest.raises(EngineError, match="bytes, the buffer has 8"):
        engine.adopt("early", 0, [bytes(8)])
    adopt_zeros(engine, "early")
    with pytest.raises(EngineError, match="0 to 49151"):
        engine.admit("early", 49152)
    engine.cancel("early")
    engine.add(engine_request("done", "prefill", TOKENS[:10]))
    engine.step()
    assert len(engine.export("done", 0, 1)) == 1
    engine.step()
    with pytest.raises(EngineError, match="has 0 blocks"):
        engine.export("done", 0, 1)
