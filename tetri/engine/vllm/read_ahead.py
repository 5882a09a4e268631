"""Reads the KV of decode requests into the core's cache before attention uses it.

Attention goes through a block in steps of a few hundred bytes, and from block to block, so that the processor fetches
data from memory late: at a quarter of the bandwidth. One pass over the blocks beforehand, one word of each cache line,
is several times as fast. So a batch is attended in parts, each with as much KV as the core's cache holds. The results
are the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

PART_BYTES = 768 << 10  # of one layer's KV; the cache of a core (L2) has 1 or 2 MiB today
LINE_BYTES = 64


def line_starts(cache: torch.Tensor) -> torch.Tensor:
    """The first word of each cache line of each block of a layer's KV: [blocks, lines], a view."""
    return cache.view(cache.shape[0], -1).view(torch.int32)[:, :: LINE_BYTES // 4]


@dataclass(slots=True)
class Part:
    """Some requests of a step, as the attention kernel takes them; `tokens`: how many of theirs the step computes.
    `full`: the blocks to read ahead; `copied`: where to."""

    tokens: int
    starts: torch.Tensor
    lengths: torch.Tensor
    blocks: torch.Tensor
    schedule: torch.Tensor
    full: torch.Tensor | None = None
    copied: torch.Tensor | None = None

    def read_ahead(self, layer: torch.Tensor) -> None:
        """Read the KV of this part in a layer, of which `line_starts` are given."""
        if self.full is not None:
            torch.index_select(layer, 0, self.full, out=self.copied)


class StepParts:
    """Divides each step into parts, once for all layers."""

    def __init__(self) -> None:
        self._step: Any = None
        self._parts: tuple[list[Part], list[int]] = [], []

    def of(self, step: Any, module: Any) -> tuple[list[Part], list[int]]:
        """The parts of a step, and how many tokens each has. `step`: vLLM's attention metadata, one object for all
        layers; `module`: one of these."""
        if step is not self._step:
            parts = _divided(step, module)
            self._step, self._parts = step, (parts, [part.tokens for part in parts])
        return self._parts


def _divided(step: Any, module: Any) -> list[Part]:
    one = [Part(step.num_actual_tokens, step.query_start_loc, step.seq_lens, step.block_table, step.scheduler_metadata)]
    if torch.get_num_threads() > 1:  # each core has a cache of its own, and another one would use what is read here
        return one
    starts, lengths = step.query_start_loc.tolist(), step.seq_lens.tolist()
    block_tokens, block_bytes = module.kv_cache.shape[2], module.kv_cache[0].nbytes
    decodes = [after - start == 1 for start, after in pairwise(starts)]
    full = [length // block_tokens if one_token else 0 for length, one_token in zip(lengths, decodes, strict=True)]
    if not any(full):
        return one
    ranges = grouped(decodes, full, PART_BYTES // block_bytes)
    return [_part(step, module, begin, end, starts, full[begin:end]) for begin, end in ranges]


def grouped(decodes: Sequence[bool], full: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Divide the requests of a step into ranges: of decode requests with at most `most` full blocks together, or of
    prefill requests; at least one each."""
    ranges: list[tuple[int, int]] = []
    blocks = 0
    for index, (decode, count) in enumerate(zip(decodes, full, strict=True)):
        if ranges and decodes[index - 1] == decode and blocks + count <= most:
            ranges[-1] = ranges[-1][0], index + 1
            blocks += count
        else:
            ranges.append((index, index + 1))
            blocks = count
    return ranges


def _part(step: Any, module: Any, begin: int, end: int, starts: Sequence[int], full: Sequence[int]) -> Part:
    from vllm import _custom_ops

    own_starts, lengths = step.query_start_loc[begin : end + 1] - starts[begin], step.seq_lens[begin:end]
    schedule = _custom_ops.cpu_attn_get_scheduler_metadata(
        num_reqs=end - begin,
        num_heads=module.num_heads,
        num_kv_heads=module.num_kv_heads,
        head_dim=module.head_size,
        seq_lens=lengths,
        dtype=module.kv_cache.dtype,
        query_start_loc=own_starts,
        causal=step.causal,
        sliding_window_size=-1,
        isa=module.isa,
        enable_kv_split=False,
    )
    blocks = step.block_table[begin:end]
    part = Part(starts[end] - starts[begin], own_starts, lengths, blocks, schedule)
    if count := sum(full):
        part.full = torch.cat([blocks[row, :number] for row, number in enumerate(full)])
        part.copied = torch.empty((count, module.kv_cache[0].nbytes // LINE_BYTES), dtype=torch.int32)
    return part
