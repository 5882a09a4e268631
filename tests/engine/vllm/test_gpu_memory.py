"""The gather and the scatter of a vLLM engine on a GPU, on numpy in place of CuPy: the same lines run on both."""

import numpy as np
import pytest
import torch

from tests.kv.cuda.stand_in import StandIn
from tetri.engine.base import EngineError
from tetri.engine.vllm.gpu_memory import GpuMemory, by_block
from tetri.kv.cuda.runtime import Device

BLOCKS, HEADS, TOKENS, WIDTH, LAYERS = 12, 3, 16, 8, 4


def tensors(dtype, layout):
    """Random KV, a tensor for each layer, as vLLM's layouts have them."""
    made = []
    for layer in range(LAYERS):
        random = torch.Generator().manual_seed(layer)
        shape = {
            "blocks first": (BLOCKS, HEADS, TOKENS, WIDTH),
            "K before V": (2, BLOCKS, TOKENS, HEADS, WIDTH),
            "heads first": (HEADS, BLOCKS, TOKENS, WIDTH),
            "layers inside": (BLOCKS, HEADS, LAYERS, TOKENS, WIDTH),
        }[layout]
        tensor = torch.randn(shape, generator=random).to(dtype)
        if layout == "heads first":
            tensor = tensor.movedim(1, 0)
        made.append(tensor[:, :, layer] if layout == "layers inside" else tensor)
    return made


def of_block(tensor, block, layout):
    row = tensor[:, block] if layout == "K before V" else tensor[block]
    return row.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.fixture(params=["blocks first", "K before V", "heads first", "layers inside"])
def layout(request):
    return request.param


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=str)
def dtype(request):
    return request.param


def memory(caches, tmp_path):
    device = Device(StandIn(tmp_path))
    return GpuMemory(caches, BLOCKS, device, lambda stream=device.stream: stream), device


def device_blocks(device, made, count):
    base = device.allocate(count * made.block_bytes, "a test")
    return [device.array(base + place * made.block_bytes, made.block_bytes) for place in range(count)]


@pytest.mark.parametrize("where", ["device", "host", "host in parts"])
def test_blocks_go_out_and_into_others_byte_for_byte(tmp_path, layout, dtype, where):
    caches, others = tensors(dtype, layout), [torch.zeros_like(each) for each in tensors(dtype, layout)]
    made, device = memory(caches, tmp_path)
    target, _ = memory(others, tmp_path)
    host = [memoryview(bytearray(made.block_bytes)) for _ in range(3)]
    buffers = device_blocks(device, made, 3) if where == "device" else host
    made.read([7, 0, 11], buffers)
    for block, buffer in zip([7, 0, 11], buffers, strict=True):
        expected = b"".join(of_block(cache, block, layout) for cache in caches)
        assert (buffer.get().tobytes() if where == "device" else bytes(buffer)) == expected
    if where == "host in parts":
        buffers = [host[0], (host[1][:5], host[1][5:]), (host[2][:100], host[2][100:700], host[2][700:])]
    target.write([2, 3, 5], buffers)
    for layer in range(LAYERS):
        for before, after in zip([7, 0, 11], [2, 3, 5], strict=True):
            assert of_block(others[layer], after, layout) == of_block(caches[layer], before, layout)
        assert not np.frombuffer(of_block(others[layer], 4, layout), np.uint8).any(), "nothing else is touched"


def test_the_tensors_are_used_in_place(tmp_path):
    caches = tensors(torch.bfloat16, "blocks first")
    made, device = memory(caches, tmp_path)
    (block,) = device_blocks(device, made, 1)
    caches[2][5] = 1.5
    made.read([5], [block])
    assert of_block(caches[2], 5, "blocks first") in block.get().tobytes()


def test_a_buffer_of_another_size_is_an_error(tmp_path):
    made, _ = memory(tensors(torch.float32, "blocks first"), tmp_path)
    for call in (made.read, made.write):
        with pytest.raises(EngineError, match="a KV block has"):
            call([1], [memoryview(bytearray(made.block_bytes - 1))])


def test_another_stream_of_vllms_is_an_error(tmp_path):
    caches, device, streams = tensors(torch.float32, "blocks first"), Device(StandIn(tmp_path)), iter([0, 0, 7])
    made = GpuMemory(caches, BLOCKS, device, lambda: next(streams))
    made.read([1], device_blocks(device, made, 1))
    with pytest.raises(RuntimeError, match="another stream"):
        made.read([1], device_blocks(device, made, 1))


@pytest.mark.parametrize("tensor", [torch.zeros(3, BLOCKS, 16), torch.zeros(BLOCKS, 16, 8).transpose(1, 2)])
def test_a_layout_that_cannot_be_moved_is_named(tensor):
    with pytest.raises(EngineError, match="unsupported KV layout: a tensor of shape"):
        by_block(tensor, BLOCKS)
