"""The KV tensors of a vLLM engine as blocks of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tetri.engine.base import EngineError


class Memory:
    """`caches`: a tensor per layer, [blocks, ...], whose memory is used in place. Inside a block of bytes the layers
    follow one another; what is inside a layer is vLLM's own."""

    def __init__(self, caches: Sequence[Any]) -> None:
        self.caches = [_block_rows(cache) for cache in caches]
        self.layers = len(self.caches)
        self.layer_bytes = self.caches[0].shape[1]
        self.block_bytes = self.layer_bytes * self.layers

    def read(self, blocks: Sequence[int], buffers: Sequence[memoryview]) -> None:
        """Copy blocks out, each into a writable buffer of `block_bytes`."""
        for block, buffer in zip(blocks, buffers, strict=True):
            target = self._layers_of(buffer)
            for layer, cache in enumerate(self.caches):
                target[layer] = cache[block]

    def write(self, blocks: Sequence[int], buffers: Sequence[memoryview]) -> None:
        """Copy `block_bytes` into each block."""
        for block, buffer in zip(blocks, buffers, strict=True):
            source = self._layers_of(buffer)
            for layer, cache in enumerate(self.caches):
                cache[block] = source[layer]

    def close(self) -> None:
        """Let go of the tensors."""
        self.caches.clear()

    def _layers_of(self, buffer: memoryview) -> np.ndarray:
        flat = np.frombuffer(buffer, dtype=np.uint8)
        if flat.size != self.block_bytes:
            raise EngineError(f"a KV block has {self.block_bytes} bytes, the buffer has {flat.size}")
        return flat.reshape(self.layers, self.layer_bytes)


def _block_rows(cache: Any) -> np.ndarray:
    """A layer's KV tensor as bytes, [blocks, bytes of a block]; shares its memory."""
    import torch

    if cache.device.type != "cpu" or not cache.is_contiguous():
        raise EngineError(f"unsupported KV layout: {cache.device.type} tensor with strides {cache.stride()}")
    return cache.view(cache.shape[0], -1).view(torch.uint8).numpy()
