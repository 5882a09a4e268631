"""The gather and the scatter of a vLLM engine's KV on the host."""

import random

import pytest
import torch

from tetri.engine.base import EngineError
from tetri.engine.vllm.memory import HostMemory

BLOCKS, LAYERS, WIDTH = 6, 5, 24


def caches(seed):
    made = torch.Generator().manual_seed(seed)
    return [torch.randn((BLOCKS, 3, WIDTH), generator=made).to(torch.bfloat16) for _ in range(LAYERS)]


def cut(data, places):
    """The same bytes in parts."""
    places = sorted({0, len(data), *places})
    return tuple(data[first:last] for first, last in zip(places, places[1:], strict=False))


def read(memory, blocks):
    buffers = [memoryview(bytearray(memory.block_bytes)) for _ in blocks]
    memory.read(blocks, buffers)
    return buffers


@pytest.mark.parametrize("places", ["none", "in layers", "between layers", "each byte", *range(20)])
def test_a_block_in_parts_is_written_as_if_it_were_in_one(places):
    source, target = HostMemory(caches(1)), HostMemory(caches(2))
    size, layer = source.block_bytes, source.layer_bytes
    chosen = {
        "none": [],
        "in layers": [layer // 2, 3 * layer + 1],
        "between layers": [layer, 2 * layer],
        "each byte": range(size),
    }
    where = chosen[places] if places in chosen else random.Random(places).sample(range(size), places % 7)
    whole, untouched = read(source, [4, 0]), read(target, [1, 3, 4])
    target.write([5, 2], [cut(whole[0], where), whole[1]])
    assert read(target, [5, 2]) == whole
    assert read(target, [1, 3, 4]) == untouched


@pytest.mark.parametrize("change", [-1, 1])
def test_parts_of_another_size_are_an_error_and_nothing_is_written(change):
    memory = HostMemory(caches(1))
    before = read(memory, list(range(BLOCKS)))
    with pytest.raises(EngineError, match="a KV block has"):
        memory.write([1], [(memoryview(b"x" * 100), memoryview(b"y" * (memory.block_bytes - 100 + change)))])
    assert read(memory, list(range(BLOCKS))) == before
