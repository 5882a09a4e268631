"""The plug-ins that vLLM loads: a KV connector and a logits processor. They have no knowledge of tetri's requests; the
engine reads their fields between steps.

vLLM creates the connector twice, for its scheduler and for its model runner. The scheduler's instance records what each
step scheduled; the runner's instance keeps the KV tensors. PlanScheduler (scheduler.py) decides which requests wait for
external KV. The engine moves the bytes between steps, never inside one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from tetri.engine.vllm.sampler import REPORT, SAMPLER, Report, RowSampler, invalid_rows


@dataclass
class StepRecord:
    """What one step of vLLM did, by request id. `computed`: token positions [start, stop) of the forward pass;
    `parked`: requests that got blocks for external KV; `freed`: block ids of each ended request."""

    computed: dict[str, tuple[int, int]] = field(default_factory=dict)
    parked: list[str] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    freed: dict[str, list[int]] = field(default_factory=dict)


class BlockConnector(KVConnectorBase_V1):
    """A KV connector that never reports external KV: when vLLM asks, adopted KV is already in the blocks, or a
    preemption has discarded it."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.record = StepRecord()
        self.kv_caches: dict[str, torch.Tensor] = {}

    # ------------------------------------------------------------ scheduler side

    def begin_step(self) -> StepRecord:
        """A new record; the next step fills it."""
        self.record = StepRecord()
        return self.record

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """vLLM's hook: no external KV."""
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """vLLM's hook: nothing to do."""

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """vLLM's hook, once per step, after scheduling and before the forward pass: record the step."""
        record, scheduled = self.record, scheduler_output.num_scheduled_tokens
        cached = scheduler_output.scheduled_cached_reqs
        starts = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for new in scheduler_output.scheduled_new_reqs:
            starts[new.req_id] = new.num_computed_tokens
        for request_id, count in scheduled.items():
            start = starts[request_id]
            record.computed[request_id] = (start, start + count)
        record.preempted.extend(sorted(scheduler_output.preempted_req_ids))
        return KVConnectorMetadata()

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """vLLM's hook: record the blocks, which vLLM frees next."""
        self.record.freed[request.request_id] = block_ids
        return False, None

    # ------------------------------------------------------------ runner side

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """vLLM's hook: keep the KV tensors, by layer name."""
        self.kv_caches = kv_caches

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """vLLM's hook: nothing to do."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """vLLM's hook: nothing to do."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """vLLM's hook: nothing to do."""

    def wait_for_save(self) -> None:
        """vLLM's hook: nothing to do."""


@dataclass(frozen=True)
class _Row:
    """One request of the batch. `sampler`: None when plain argmax is correct. `outputs`: its tokens of this engine,
    which vLLM extends. `report`: told of the tokens, or of none when its logits are no valid numbers."""

    sampler: RowSampler | None
    outputs: list[int]
    report: Report


class SamplerPlugin(LogitsProcessor):
    """Applies each request's RowSampler to its row of logits; vLLM then takes the argmax."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, _Row] = {}

    def is_argmax_invariant(self) -> bool:
        """vLLM's hook: False, sampling changes the argmax."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """vLLM's hook: follow the changes of the batch's rows."""
        process_dict_updates(self._rows, batch_update, self._row)

    @staticmethod
    def _row(params: Any, prompt: list[int] | None, outputs: list[int]) -> _Row:
        sampler = params.extra_args[SAMPLER](prompt)
        return _Row(None if sampler.idle else sampler, outputs, params.extra_args[REPORT])

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """vLLM's hook: sample on the rows of `logits` [rows, vocab], in place."""
        bad = invalid_rows(logits)
        for index in bad:
            logits[index] = 0.0  # vLLM takes some token, which the engine does not report
            self._rows[index].report(())
        for index, row in self._rows.items():
            if row.sampler is None or index in bad:
                continue
            there = logits[index]
            here = there.cpu()  # on the CPU the same tensor; from a GPU a copy, so that CPU and GPU sample alike
            tokens = row.sampler.apply(here, row.outputs)
            if tokens is not None:
                row.report(tokens)
            if here is not there:
                there.copy_(here)
        return logits
