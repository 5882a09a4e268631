"""What a leg of a vLLM engine may be, and its cancel. What holds for every engine is in test_scheduler.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from handover import BLOCK, TEXT, TOKENS, Pair, Request, adopt_zeros, crowd, engine_request
from vllm_process import BLOCK_BYTES, CONTEXT, arguments

from tetri.engine.base import EngineError
from tetri.engine.vllm.engine import VllmEngine
from tetri.engine.vllm.setup import VllmSettings, check_layout
from tetri.engine_request import INVALID, Sampled
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


def test_layouts_that_cannot_be_moved_are_refused_by_name():
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    fields = {"block_size": 128, "num_kv_heads": 3, "head_size": 64, "dtype": torch.float32}
    full, window = FullAttentionSpec(**fields), SlidingWindowSpec(**fields, sliding_window=512)
    for specs, why in (
        ([full, full], r"2 KV cache groups \(FullAttentionSpec, FullAttentionSpec\); only one"),
        ([window], "SlidingWindowSpec; only full attention"),
        ([FullAttentionSpec(**fields, sliding_window=512)], "a sliding window or chunks; only full attention"),
    ):
        groups = [SimpleNamespace(kv_cache_spec=spec) for spec in specs]
        with pytest.raises(EngineError, match=f"^unsupported KV layout: {why} can be moved$"):
            check_layout(SimpleNamespace(kv_cache_groups=groups))


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


def test_end_of_sequence(float32, engine):
    """min_tokens forbids the end; without it a leg ends with "stop" where the model says so."""
    # A repetition penalty below 1 pulls tokens of the prompt: the end of sequence becomes the best choice.
    requests = {
        key: Request(key, [2] * 40, Sampling(max_tokens=8, repetition_penalty=0.01, **more))
        for key, more in (("stop", {}), ("ignored", {"ignore_eos": True}), ("least", {"min_tokens": 4}))
    }
    Pair(float32.prefill, engine).carry(*requests.values())
    assert (requests["stop"].ids, requests["stop"].reason) == ([2], "stop")
    assert (requests["ignored"].ids, requests["ignored"].reason) == ([2] * 8, "length")
    assert 2 not in requests["least"].ids[:4] and len(requests["least"].ids) > 4


# ---------------------------------------------------------------- requests that stay


def test_requests_that_wait_where_they_were_prefilled_keep_no_other_from_running(float32, engine, model):
    """More of them than vLLM lets run at a time."""
    settings = VllmSettings(**arguments(model, "float32", 181))
    waiting = [f"d{number}" for number in range(settings.max_requests + 8)]
    for key in waiting:
        engine.add(engine_request(f"p{key}", "prefill", TOKENS[:4]))
        engine.stay(f"p{key}", key)
    tokens: dict[str, int] = {}
    while len(tokens) < len(waiting):
        tokens |= {sampled.key: sampled.token for sampled in engine.step().tokens}
    assert len(set(tokens.values())) == 1
    request = Request("x", TOKENS[:40], TEXT)
    Pair(engine, engine).carry(request)
    assert request.ids == float32.reference.generate(list(TOKENS[:40]), TEXT).ids
    for key in waiting:
        engine.cancel(key)


def test_nan_ends_one_that_was_to_stay(engine):
    engine.fill_next(1, 0xFF)
    engine.add(engine_request("p", "prefill", TOKENS[:40]))
    engine.stay("p", "d")
    assert engine.step().tokens == (Sampled("p", (), "error", INVALID),)
    with pytest.raises(EngineError, match="does not wait for admission"):
        engine.admit("d", 5)


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


# ---------------------------------------------------------------- cancels


def test_cancel_of_a_preempted_leg(engine):
    ballast = crowd(engine, TOKENS[:127])
    while not (done := engine.step()).preempted:
        pass
    assert done.preempted == ("x",) and dict(done.held)["x"] == 0
    for key in ("x", *ballast, "first"):
        engine.cancel(key)
    assert engine.free_blocks() == engine.facts()[1].blocks


def test_a_key_can_come_back_after_a_cancel(float32, engine):
    reference = float32.reference.generate(list(TOKENS), TEXT)
    for phase in ("prefill", "decode"):
        engine.add(engine_request(f"{phase[0]}x", phase))
        assert engine.step().held == ((f"{phase[0]}x", 4 if phase == "prefill" else 6),)
        engine.cancel(f"{phase[0]}x")
    request = Request("x", TOKENS, TEXT)
    Pair(engine, engine).carry(request)
    assert request.ids == reference.ids
