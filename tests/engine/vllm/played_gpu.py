"""vLLM for the CPU, made to believe that its memory is a GPU's, which the stand-in plays: all of tetri's own code for a
GPU runs on the real model's KV, only CUDA and the attention kernels are not there."""

from __future__ import annotations

from tests.kv.cuda.stand_in import install
from tetri.engine.vllm import setup as vllm_setup
from tetri.engine.vllm.gpu_memory import GpuMemory


def play(folder: str) -> None:
    install(folder)
    vllm_setup._check_build = lambda gpu: None
    vllm_setup._gpu_attention = vllm_setup._instruction_set
    vllm_setup._on_gpu = lambda gpu, caches, blocks: GpuMemory(caches, blocks, gpu, lambda: gpu.stream)
