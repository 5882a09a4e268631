"""Makes the forward pass of a loaded model quicker on the CPU. It replaces the `forward` of single layers by direct
calls of the kernels; modules, weights, hooks and all that is around the layers stay.

vLLM's layers serve many devices: on the CPU a norm is nine operations of torch, and a call of a kernel passes through
five Python functions. With a small model that takes as long as half of the weights. A layer is replaced only if its
type and settings are those known here; any other keeps its own `forward`.

In float32 only calls are saved: every kernel is the one that vLLM would run, so results are equal bit for bit. In
bfloat16 a norm is vLLM's compiled kernel, which rounds once where the operations of torch round twice.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import getclosurevars
from typing import Any

import torch
from torch import split_with_sizes
from torch.nn.functional import silu
from vllm import _custom_ops
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from tetri.engine.vllm.read_ahead import StepParts, line_starts

Forward = Callable[..., Any]
LINEAR = (QKVParallelLinear, MergedColumnParallelLinear, RowParallelLinear)


def quicken(model: Any, dtype: torch.dtype) -> int:
    """Replace the `forward` of all layers that are known here; returns their number. `model` has its KV space."""
    parts = StepParts()
    count = 0
    for module in reversed([*model.modules()]):  # what is inside a layer before the layer
        forward = _quick(module, dtype, parts)
        if forward is not None:
            module.forward = forward
            count += 1
    return count


def _quick(module: Any, dtype: torch.dtype, parts: StepParts) -> Forward | None:
    """A quicker `forward`; None when there is none for this layer."""
    kind = type(module)
    if kind in LINEAR:
        return _linear(module)
    if kind is Attention:
        return _attention(module, parts)
    if kind is RotaryEmbedding:
        return _rotary(module, dtype)
    if kind is SiluAndMul:
        return _silu_and_mul
    if kind is RMSNorm and dtype != torch.float32:
        return _norm(module, dtype)
    return _llama(module) if kind is LlamaDecoderLayer else None


def _linear(module: Any) -> Forward | None:
    plain = type(module.quant_method) is UnquantizedLinearMethod and module.tp_size == 1
    if not plain or module.skip_bias_add or not module.return_bias:
        return None
    multiply, weight, bias = module.cpu_linear, module.weight, module.bias
    handler = getclosurevars(multiply).nonlocals.get("handler")
    if not isinstance(handler, _custom_ops.CPUDNNLGEMMHandler):
        return lambda given: (multiply(given, weight, bias), None)
    packed, width, product = handler.handler_tensor, handler.n, torch.ops._C.onednn_mm.default

    def forward(given: torch.Tensor) -> tuple[torch.Tensor, None]:
        if given.dim() != 2:
            return multiply(given, weight, bias), None
        out = torch.empty((given.shape[0], width), dtype=given.dtype)
        product(out, given, bias, packed)
        return out, None

    return forward


def _norm(module: Any, dtype: torch.dtype) -> Forward | None:
    weight, epsilon = module.weight, module.variance_epsilon
    if module.variance_size_override is not None or weight.dtype != dtype or weight.numel() % 32:
        return None
    if not module.pass_weight:
        return None
    norm, add_and_norm = torch.ops._C.rms_norm.default, torch.ops._C.fused_add_rms_norm.default
    values = weight.data

    def forward(given: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        if residual is None:
            norm(out := torch.empty(given.shape, dtype=dtype), given.contiguous(), values, epsilon)
            return out
        given, residual = given.contiguous(), residual.contiguous()
        add_and_norm(given, residual, values, epsilon)  # in place, as on a GPU
        return given, residual

    return forward


def _silu_and_mul(given: torch.Tensor) -> torch.Tensor:
    gate, up = given.chunk(2, dim=-1)
    return silu(gate).mul_(up)  # vLLM's compiled kernel takes four times as long in a chunk of 512


def _rotary(module: Any, dtype: torch.dtype) -> Forward:
    table = module._match_cos_sin_cache_dtype(torch.empty(0, dtype=dtype))
    size, neox = module.head_size, module.is_neox_style

    def forward(positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None) -> Any:
        _custom_ops.rotary_embedding(positions, query, key, size, table, neox)
        return query, key

    return forward


def _attention(module: Any, parts: StepParts) -> Forward | None:
    """Without the hooks of KV connectors, in which ours does nothing."""
    impl = module.impl
    if type(impl) is not CPUAttentionBackendImpl or impl.attn_type != AttentionType.DECODER:
        return None
    if module.query_quant is not None or module.kv_sharing_target_layer_name is not None:
        return None
    if impl.kv_cache_dtype != "auto" or impl.sliding_window != -1:
        return None
    name, heads, kv_heads, size = module.layer_name, module.num_heads, module.num_kv_heads, module.head_size
    cache = module.kv_cache
    keys, values = cache.view(cache.shape[0], kv_heads, 2 * cache.shape[2], size).chunk(2, dim=2)
    lines = line_starts(cache)
    save, attend = torch.ops._C.cpu_attn_reshape_and_cache.default, torch.ops._C.cpu_attention_with_kv_cache.default
    scaled, kind = (1.0, 1.0, "auto"), module.isa
    slopes, cap, sinks = impl.alibi_slopes, impl.logits_soft_cap, impl.sinks

    def forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        context = get_forward_context()
        out = torch.empty(query.shape, dtype=query.dtype)
        if context.attn_metadata is None:  # vLLM warms up
            return out
        step = context.attn_metadata[name]
        key, value = key.view(-1, kv_heads, size), value.view(-1, kv_heads, size)
        save(key, value, keys, values, context.slot_mapping[name], kind, *scaled)
        divided, sizes = parts.of(step, module)
        queries = split_with_sizes(query.view(-1, heads, size), sizes)
        results = split_with_sizes(out.view(-1, heads, size), sizes)
        for part, own, result in zip(divided, queries, results, strict=True):
            part.read_ahead(lines)
            batch = (part.starts, part.lengths, impl.scale, step.causal, slopes, -1, part.blocks, cap)
            attend(own, keys, values, result, *batch, part.schedule, sinks, None, *scaled)
        return out

    return forward


def _llama(layer: Any) -> Forward | None:
    """A layer of Llama and its kin, without the calls from module to module."""
    attention, mlp = layer.self_attn, layer.mlp
    if type(attention) is not LlamaAttention or type(mlp) is not LlamaMLP:
        return None
    before, between = layer.input_layernorm.forward, layer.post_attention_layernorm.forward
    split, rotate = attention.qkv_proj.forward, attention.rotary_emb.forward
    attend, join = attention.attn.forward, attention.o_proj.forward
    widen, activate, narrow = mlp.gate_up_proj.forward, mlp.act_fn.forward, mlp.down_proj.forward
    sizes = [attention.q_size, attention.kv_size, attention.kv_size]

    def forward(positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None) -> Any:
        if residual is None:
            residual, hidden_states = hidden_states, before(hidden_states)
        else:
            hidden_states, residual = before(hidden_states, residual)
        query, key, value = split_with_sizes(split(hidden_states)[0], sizes, dim=-1)
        query, key = rotate(positions, query, key)
        hidden_states, residual = between(join(attend(query, key, value))[0], residual)
        return narrow(activate(widen(hidden_states)[0]))[0], residual

    return forward
