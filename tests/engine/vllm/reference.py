"""vLLM alone: no connector, no hand-over, one engine from prompt to last token. What tetri's engines must equal.

Driven step by step so that the KV blocks of the prompt can be looked at when the prefill is done. Only the sampler is
tetri's: the same noise is the point of comparing drawn texts; and in bfloat16 the layers, which round less often there.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from plain import Text
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor import Executor
from vllm.v1.request import Request
from vllm.v1.sample import sampler

from tetri.engine.vllm.connector import SamplerPlugin
from tetri.engine.vllm.quick_layers import quicken
from tetri.engine.vllm.sampler import REPORT, SAMPLER, RowSampler
from tetri.request import Sampling, TokenLogprob

STOP_IDS = (2,)  # of this model
SAMPLED_BY_VLLM = ("max_tokens", "min_tokens", "stop_token_ids", "ignore_eos", "logprobs", "logit_bias")
SAMPLED_BY_VLLM += ("presence_penalty", "frequency_penalty", "repetition_penalty")


class RecordingSampler(SamplerPlugin):
    gaps: list[float] = []

    def apply(self, logits: Any) -> Any:
        best = logits[0].topk(2).values
        self.gaps.append(float(best[0] - best[1]))
        return super().apply(logits)


class Reference:
    def __init__(
        self, model: Path, *, dtype: str, chunk_tokens: int, max_batch: int, kv_bytes: int, context: int, weights: str
    ) -> None:
        arguments = EngineArgs(
            model=str(model),
            skip_tokenizer_init=True,
            dtype=dtype,
            max_model_len=context,
            enforce_eager=True,
            distributed_executor_backend="uni",
            enable_prefix_caching=False,
            enable_chunked_prefill=True,
            async_scheduling=False,
            max_num_batched_tokens=chunk_tokens,
            max_num_seqs=max_batch,
            block_size=128,
            kv_cache_memory_bytes=kv_bytes,
            disable_log_stats=True,
            logits_processors=[RecordingSampler],
        )
        config = arguments.create_engine_config()
        # For the ranks of tokens, which no test reads: vLLM would compile it, and need a C++ compiler for that.
        sampler.batched_count_greater_than = lambda all_values, values: (all_values >= values).sum(-1)
        self.core = EngineCore(config, Executor.get_class(config), log_stats=False)
        if dtype == "bfloat16":
            quicken(self.core.model_executor.driver_worker.worker.model_runner.get_model(), config.model_config.dtype)
        self.caches = self.core.model_executor.driver_worker.worker.model_runner.kv_caches
        self.manager = self.core.scheduler.kv_cache_manager
        self.vocab = config.model_config.get_vocab_size()

    def generate(self, tokens: list[int], sampling: Sampling) -> Text:
        """One request, alone in the engine."""
        ids: list[int] = []
        make = partial(RowSampler, sampling, output_from=len(tokens), stop_ids=STOP_IDS, vocab=self.vocab)
        params = SamplingParams(
            temperature=0.0,
            max_tokens=sampling.max_tokens,
            stop_token_ids=[] if sampling.ignore_eos else list(STOP_IDS),
            detokenize=False,
            extra_args={SAMPLER: make, REPORT: lambda tokens: tokens or ids.append(-1)},
        )
        self.core.scheduler.add_request(Request("text", tokens, params, None))
        gaps: list[float] = []
        digests: list[str] = []
        self._zero_next(-(-len(tokens) // 128))
        while self.core.scheduler.has_unfinished_requests():
            RecordingSampler.gaps.clear()
            blocks = self.manager.get_block_ids("text")[0]
            outputs, _ = self.core.step()
            if outputs:
                ids += outputs[0].outputs[0].new_token_ids
                gaps += RecordingSampler.gaps
            if len(ids) == 1 and not digests and self.core.scheduler.has_unfinished_requests():
                blocks = self.manager.get_block_ids("text")[0]
                digests = [self._digest(block) for block in blocks]
        return Text(ids, gaps, digests)

    def by_vllm(self, tokens: list[int], sampling: Sampling) -> tuple[list[TokenLogprob], str]:
        """One greedy request on which vLLM's own sampler alone works, and the reason for its end."""
        fields = {name: getattr(sampling, name) for name in SAMPLED_BY_VLLM}
        plain = partial(RowSampler, Sampling(), output_from=len(tokens), stop_ids=STOP_IDS, vocab=self.vocab)
        extra = {SAMPLER: plain, REPORT: lambda tokens: None}
        params = SamplingParams(temperature=0.0, detokenize=False, extra_args=extra, **fields)
        params.update_from_generation_config({}, *STOP_IDS)
        self.core.scheduler.add_request(Request("text", tokens, params, None))
        found: list[TokenLogprob] = []
        while True:
            outputs, _ = self.core.step()
            for output in outputs[0].outputs if outputs else ():
                (token, *ids), (logprob, *values) = (
                    part[0].tolist() for part in (output.new_logprobs.logprob_token_ids, output.new_logprobs.logprobs)
                )
                found.append(TokenLogprob(token, logprob, dict(zip(ids, values, strict=True))))
                if output.finish_reason is not None:
                    return found, str(output.finish_reason)

    def _zero_next(self, count: int) -> None:
        fill_blocks(self.caches, next_free_blocks(self.manager, count))

    def _digest(self, block: int) -> str:
        import torch

        parts = [cache[block].contiguous().view(-1).view(torch.uint8).numpy() for cache in self.caches]
        return digest(np.concatenate(parts))


def next_free_blocks(manager: Any, count: int) -> list[int]:
    """The ids of the blocks that vLLM's block manager will hand out next."""
    return [block.block_id for block in manager.block_pool.free_block_queue.get_all_free_blocks()[:count]]


def fill_blocks(caches: Any, blocks: list[int], value: int = 0) -> None:
    """So that slots of a last block which no token uses hold zeros on both sides of a comparison, not what an
    earlier request left there."""
    for cache in caches:
        for block in blocks:
            cache[block] = value


def digest(block: Any) -> str:
    return xxhash.xxh3_128_hexdigest(memoryview(block))
