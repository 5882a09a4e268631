"""Quicker layers give what vLLM's layers give: in float32 bit for bit (also test_connector.py: all KV and all tokens),
in bfloat16 within its precision. Layers with other settings stay as they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.model  # not for its time, but because it loads vLLM

WIDTH = 64


@pytest.fixture(scope="module")
def layers() -> Iterator[Any]:
    from tetri.engine.vllm.setup import prepare_environment

    prepare_environment()
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers import activation, layernorm, rotary_embedding

    with set_current_vllm_config(VllmConfig()):
        yield activation, layernorm, rotary_embedding


def quick(module: Any, dtype: torch.dtype) -> Any:
    from tetri.engine.vllm.quick_layers import _quick
    from tetri.engine.vllm.read_ahead import StepParts

    return _quick(module, dtype, StepParts())


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def test_a_norm_in_bfloat16_is_off_by_its_rounding_at_most(layers):
    norm = layers[1].RMSNorm(WIDTH, dtype=torch.bfloat16)
    norm.weight.data.copy_(drawn(WIDTH))
    forward, given, residual = quick(norm, torch.bfloat16), drawn(5, WIDTH, seed=1), drawn(5, WIDTH, seed=2)
    close = {"rtol": 2**-6, "atol": 2**-7}
    torch.testing.assert_close(forward(given), norm.forward_native(given), **close)
    wanted, added = norm.forward_native(given.clone(), residual.clone())
    found, sums = forward(given.clone(), residual.clone())
    torch.testing.assert_close(found, wanted, **close)
    assert torch.equal(sums, added)
    apart = drawn(5, 2 * WIDTH, seed=3)[:, ::2]  # rows that are not contiguous
    torch.testing.assert_close(forward(apart), norm.forward_native(apart), **close)


def test_activation_and_rotation_are_the_same_bit_for_bit(layers):
    act = layers[0].SiluAndMul()
    given = drawn(3, 2 * WIDTH)
    assert torch.equal(quick(act, torch.bfloat16)(given.clone()), act.forward_native(given))
    parameters = {"rope_type": "default", "rope_theta": 1e4}
    rope = layers[2].get_rope(WIDTH, max_position=99, rope_parameters=parameters, dtype=torch.bfloat16)
    positions, query, key = torch.tensor([4, 98]), drawn(2, 2 * WIDTH), drawn(2, WIDTH, seed=1)
    wanted = rope.forward_cpu(positions, query.clone(), key.clone())
    found = quick(rope, torch.bfloat16)(positions, query.clone(), key.clone())
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_what_is_not_known_stays_as_it_is(layers):
    norm = layers[1].RMSNorm
    kind = type("Other", (norm,), {})
    assert quick(norm(WIDTH, dtype=torch.float32), torch.float32) is None  # vLLM's own operations, bit for bit
    assert quick(norm(WIDTH, dtype=torch.float32), torch.bfloat16) is None
    assert quick(norm(WIDTH, var_hidden_size=32, dtype=torch.bfloat16), torch.bfloat16) is None
    assert quick(kind(WIDTH, dtype=torch.bfloat16), torch.bfloat16) is None
    assert quick(torch.nn.Linear(2, 2), torch.bfloat16) is None
