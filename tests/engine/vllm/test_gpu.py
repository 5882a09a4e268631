"""The real model on a GPU: gather and scatter on its memory, and prefill and decode workers whose KV goes through
`cuda_ipc`, against plain vLLM."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from live import VLLM, LiveCluster
from vllm_process import BLOCK_BYTES, arguments

from tests.kv.cuda import gpus
from tests.kv.cuda.stand_in import StandIn
from tetri.client import Client
from tetri.engine.base import EngineError
from tetri.kv.cuda.runtime import Device

TOKENS = 24
REFERENCE = """
import json, sys
from vllm import LLM, SamplingParams
model, prompts, tokens = json.load(sys.stdin)
engine = LLM(model=model, dtype="float32", enforce_eager=True, enable_prefix_caching=False, max_model_len=2304,
             max_num_batched_tokens=512, block_size=128, gpu_memory_utilization=0.5, skip_tokenizer_init=True)
sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
ids = [list(engine.generate({"prompt_token_ids": p}, sampling)[0].outputs[0].token_ids) for p in prompts]
print("\\n" + json.dumps(ids))
"""


@pytest.fixture
def torch_on_gpu():
    if gpus.machine().stand_in:
        pytest.skip("torch knows no stand-in")
    import torch

    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} has no CUDA: install tetri[vllm]")
    return torch


@pytest.mark.model
def test_the_slab_is_made_before_vllm_takes_memory(model, monkeypatch):
    from tetri.engine.vllm import engine as vllm

    class Stop(Exception):
        pass

    started, asked = [], []
    monkeypatch.setattr(vllm, "start_core", lambda *args: started.append(args))

    def reserve(block_bytes):
        asked.append(block_bytes)
        raise Stop

    with pytest.raises(Stop):
        vllm.VllmEngine(**arguments(model, "float32", 20), reserve=reserve)
    assert asked == [BLOCK_BYTES["float32"]] and not started


@pytest.mark.model
def test_a_gpu_for_a_vllm_that_is_built_for_the_cpu_is_one_line(model, tmp_path):
    from vllm.platforms import current_platform

    from tetri.engine.vllm.engine import VllmEngine

    if not current_platform.is_cpu():
        pytest.skip(f"this vLLM is built for {current_platform.device_type}")
    with pytest.raises(EngineError, match="gpu is set, but this vLLM is built for cpu"):
        VllmEngine(**arguments(model, "float32", 20), gpu=Device(StandIn(tmp_path)))


@pytest.mark.gpu
@pytest.mark.parametrize("first", [True, False], ids=["blocks first", "K before V"])
def test_blocks_of_bfloat16_are_gathered_and_scattered(torch_on_gpu, first):
    from tetri.engine.vllm.gpu_memory import GpuMemory
    from tetri.kv.cuda.runtime import load

    torch, device = torch_on_gpu, Device(load())
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        shape = (64, 3, 128, 128) if first else (2, 64, 128, 3, 64)
        caches = [torch.randn(shape, device="cuda").to(torch.bfloat16) for _ in range(8)]
        others = [torch.zeros_like(cache) for cache in caches]
        here, there = (GpuMemory(each, 64, device, lambda: int(stream.cuda_stream)) for each in (caches, others))
        base = device.allocate(3 * here.block_bytes, "a test")
        buffers = [device.array(base + place * here.block_bytes, here.block_bytes) for place in range(3)]
        here.read([7, 0, 63], buffers)
        there.write([2, 3, 5], buffers)
        hosted = [memoryview(bytearray(here.block_bytes)) for _ in range(3)]
        there.read([2, 3, 5], hosted)
        stream.synchronize()
        for cache, other in zip(caches, others, strict=True):
            before, after = (cache, other) if first else (cache.movedim(1, 0), other.movedim(1, 0))
            assert torch.equal(before[[7, 0, 63]], after[[2, 3, 5]]) and not after[4].any()
        assert [bytes(each) for each in hosted] == [bytes(each.get()) for each in buffers]
    device.release(base)
    gpus.report("gather and scatter, bfloat16", device=torch.cuda.get_device_name(), equal=True)


@pytest.mark.gpu
@pytest.mark.model
@pytest.mark.timeout(900)
def test_a_hand_over_between_two_engines_on_one_gpu_gives_plain_vllms_tokens(torch_on_gpu, model, prompts):
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        pytest.skip(f"this vLLM is built for {current_platform.device_type}: install tetri[vllm]")
    chosen = prompts[:15]
    answer = subprocess.run(
        [sys.executable, "-c", REFERENCE],
        input=json.dumps([str(model), chosen, TOKENS]),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
    right = json.loads(answer.stdout.splitlines()[-1])
    settings = ["model.dtype=float32", "model.context=2304", "engine.kv_mib=2000", "transfer.slab_blocks=24"]
    with LiveCluster(VLLM, [*settings, "worker.p0.gpu=0", "worker.d0.gpu=0"], 400.0) as cluster:
        with Client(cluster.config.clients_address) as client:
            results = [client.generate(prompt, max_tokens=TOKENS, ignore_eos=True) for prompt in chosen]
        cluster.wait_idle()
    assert {result.receipt.transport for result in results} == {"cuda_ipc"}
    same = sum(result.token_ids == ids for result, ids in zip(results, right, strict=True))
    gpus.report("vLLM, prefill to decode", device=torch_on_gpu.cuda.get_device_name(), equal=same == len(chosen))
    assert same == len(chosen)
