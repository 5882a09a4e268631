"""Reads and writes the KV tensors of a vLLM engine on a GPU as blocks of bytes. Gather and scatter between vLLM's paged
blocks and the slab are device kernels, a few for each layer, for any number of blocks. The same code runs on numpy.

CuPy has no bfloat16, so all tensors are viewed as uint8, in place, through DLPack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tetri.engine.base import EngineError
from tetri.kv.base import Block, joined
from tetri.kv.cuda.runtime import Device


class GpuMemory:
    """As HostMemory, for a GPU. `caches`: one tensor for each layer, of `blocks` blocks. Buffers are device arrays of
    uint8, or host memory at the cost of one more copy.

    All work runs on vLLM's stream, `stream()`, in order with its kernels: `read` gets what the last step wrote, and
    `write` is done before the next step. So `device`, which the KV store also uses, is switched to that stream."""

    def __init__(self, caches: Sequence[Any], blocks: int, device: Device, stream: Callable[[], int]) -> None:
        self._device, self._stream = device, stream
        device.stream = stream()
        with device.computing() as xp:
            self.caches = [xp.from_dlpack(by_block(cache, blocks)) for cache in caches]
        self.layers = len(self.caches)
        self.layer_bytes = self.caches[0][0].size
        self.block_bytes = self.layer_bytes * self.layers

    def read(self, blocks: Sequence[int], buffers: Sequence[Block]) -> None:
        """Copy each block into a writable buffer of `block_bytes`. Raises EngineError for another size."""
        count = self._paired(blocks, buffers)
        with self._computing() as xp:
            ids = xp.asarray(np.array(blocks, np.int64))
            chunk = xp.empty((count, self.layers, self.layer_bytes), xp.uint8)
            for layer, cache in enumerate(self.caches):
                chunk[:, layer] = cache[ids].reshape(count, self.layer_bytes)
            host = xp.asnumpy(chunk) if any(map(_on_host, buffers)) else None
            for place, buffer in enumerate(buffers):
                if host is None:
                    self._sized(buffer)[:] = chunk[place].reshape(-1)
                else:
                    self._sized(np.frombuffer(buffer, np.uint8))[:] = host[place].reshape(-1)

    def write(self, blocks: Sequence[int], buffers: Sequence[Block]) -> None:
        """Copy a buffer of `block_bytes` into each block. Raises EngineError for another size."""
        count, buffers = self._paired(blocks, buffers), [joined(buffer) for buffer in buffers]
        with self._computing() as xp:
            ids = xp.asarray(np.array(blocks, np.int64))
            if any(map(_on_host, buffers)):
                host = [self._sized(np.frombuffer(buffer, np.uint8)) for buffer in buffers]
                chunk = xp.asarray(np.concatenate(host))
            else:
                chunk = xp.empty((count, self.block_bytes), xp.uint8)
                for place, buffer in enumerate(buffers):
                    chunk[place] = self._sized(buffer)
            rows = chunk.reshape(count, self.layers, self.layer_bytes)
            for layer, cache in enumerate(self.caches):
                cache[ids] = rows[:, layer].reshape(count, *cache.shape[1:])

    def _computing(self) -> Any:
        if self._stream() != self._device.stream:
            raise RuntimeError("vLLM computes on another stream than when it started: KV would be copied out of order")
        return self._device.computing()

    @staticmethod
    def _paired(blocks: Sequence[int], buffers: Sequence[Block]) -> int:
        if len(blocks) != len(buffers):
            raise ValueError(f"{len(blocks)} blocks and {len(buffers)} buffers")
        return len(blocks)

    def _sized(self, buffer: Any) -> Any:
        if buffer.size != self.block_bytes:
            raise EngineError(f"a KV block has {self.block_bytes} bytes, the buffer has {buffer.size}")
        return buffer

    def close(self) -> None:
        """Release the tensors."""
        self.caches.clear()


def _on_host(buffer: Block) -> bool:
    return isinstance(buffer, memoryview | bytes | bytearray)


def by_block(cache: Any, blocks: int) -> Any:
    """A view of a layer's KV tensor as bytes, [blocks, ...]. A block need not be contiguous, as when all K come before
    all V. Raises EngineError that names an unsupported layout."""
    import torch

    shape, strides = tuple(cache.shape), cache.stride()
    if shape[0] != blocks and shape[:2] == (2, blocks):
        cache = cache.movedim(1, 0)
    elif shape[0] != blocks:
        raise EngineError(f"unsupported KV layout: a tensor of shape {shape} for {blocks} blocks")
    if strides[-1] != 1:
        raise EngineError(f"unsupported KV layout: a tensor of shape {shape} with strides {strides}")
    return cache.view(torch.uint8)
