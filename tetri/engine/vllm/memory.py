"""Reads and writes the KV tensors of a vLLM engine on the CPU as blocks of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tetri.engine.base import EngineError
from tetri.kv.base import Block, parts


class HostMemory:
    """`caches`: one tensor for each layer, [blocks, ...], used in place. A block of bytes has the layers in order; vLLM
    defines the layout inside a layer."""

    def __init__(self, caches: Sequence[Any]) -> None:
        self.caches = [_block_rows(cache) for cache in caches]
        self.layers = len(self.caches)
        self.layer_bytes = self.caches[0].shape[1]
        self.block_bytes = self.layer_bytes * self.layers

    def read(self, blocks: Sequence[int], buffers: Sequence[memoryview]) -> None:
        """Copy each block into a writable buffer of `block_bytes`. Raises EngineError for another size."""
        for block, buffer in zip(blocks, buffers, strict=True):
            target = np.frombuffer(buffer, np.uint8)
            self._check(target.size)
            target = target.reshape(self.layers, self.layer_bytes)
            for layer, cache in enumerate(self.caches):
                target[layer] = cache[block]

    def write(self, blocks: Sequence[int], buffers: Sequence[Block]) -> None:
        """Copy `block_bytes` into each block, from one memoryview or from a tuple of parts. Raises EngineError for
        another size."""
        for block, buffer in zip(blocks, buffers, strict=True):
            sources = [np.frombuffer(part, np.uint8) for part in parts(buffer)]
            self._check(sum(source.size for source in sources))
            place = 0
            for source in sources:
                self._scatter(block, place, source)
                place += source.size

    def _scatter(self, block: int, place: int, source: np.ndarray) -> None:
        """Copy `source` into a block, starting at byte `place` of the block."""
        layer, inside = divmod(place, self.layer_bytes)
        at = 0
        while at < source.size:
            row = self.caches[layer][block, inside:][: source.size - at]
            row[:] = source[at : at + row.size]
            at, layer, inside = at + row.size, layer + 1, 0

    def close(self) -> None:
        """Release the tensors."""
        self.caches.clear()

    def _check(self, size: int) -> None:
        if size != self.block_bytes:
            raise EngineError(f"a KV block has {self.block_bytes} bytes, the buffer has {size}")


def _block_rows(cache: Any) -> np.ndarray:
    """A view of a layer's KV tensor as bytes, [blocks, bytes of a block]."""
    import torch

    if cache.device.type != "cpu" or not cache.is_contiguous():
        raise EngineError(f"unsupported KV layout: {cache.device.type} tensor with strides {cache.stride()}")
    return cache.view(cache.shape[0], -1).view(torch.uint8).numpy()
