"""Whole texts by vLLM in one process, many at once: what an offline tool needs of a model. Sampling is the served
requests' own, so that a text depends on its prompt and seed alone, whatever it was batched with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tetri.engine.base import EngineError
from tetri.engine.vllm.sampler import vllm_params
from tetri.engine.vllm.setup import VllmSettings, engine_config, prepare_environment, start_core, stop_ids
from tetri.request import Sampling

BLOCK_TOKENS = 128


@dataclass(slots=True)
class WrittenText:
    """What the model wrote: `ids`, and why it ended, "stop" or "length". `states`: output tokens known -> hidden state
    of the last token then, float32 [layers, hidden]; 0 is the end of the prompt."""

    key: str
    ids: list[int] = field(default_factory=list)
    reason: str = ""
    states: dict[int, Any] = field(default_factory=dict)


class Writer:
    """Texts of at most `context` tokens, prompt and output together. `batch`: how many are to be written at a time;
    whoever adds them keeps to it. `layers`: after how many of the model's layers hidden states are kept, at the end of
    the prompt and every `every` output tokens. Raises EngineError, one line, when the checkpoint cannot be loaded."""

    def __init__(
        self,
        model: Path,
        *,
        dtype: str,
        batch: int,
        context: int | None,
        kv_bytes: int = 3 << 30,
        chunk_tokens: int = 1024,
        layers: Sequence[int] = (),
        every: int = 64,
    ) -> None:
        threads = prepare_environment()
        import torch

        from tetri.engine.vllm.hidden_states import LayerHook

        torch.set_num_threads(threads)
        settings = VllmSettings(model, dtype, chunk_tokens, batch, kv_bytes, context, "", BLOCK_TOKENS)
        settings.check()
        config = engine_config(settings, serving=False)
        self._core = start_core(settings, config)
        self._stop_ids = stop_ids(config)
        self._vocab = config.model_config.get_vocab_size()
        self._every = every
        self._texts: dict[str, WrittenText] = {}
        self._hook = LayerHook(self._core, layers, self._hooked) if layers else None
        self.context: int = config.model_config.max_model_len

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, key: str, prompt: Sequence[int], sampling: Sampling) -> None:
        """Raises EngineError for a prompt that leaves no room for `max_tokens`."""
        from vllm.v1.request import Request

        if not prompt or len(prompt) + sampling.max_tokens > self.context:
            raise EngineError(
                f"{len(prompt)} prompt tokens and up to {sampling.max_tokens} of output are not within"
                f" {self.context} tokens of context"
            )
        params = vllm_params(sampling, len(prompt), sampling.max_tokens, self._stop_ids, self._vocab)
        self._texts[key] = WrittenText(key)
        self._core.scheduler.add_request(Request(key, list(prompt), params, None))

    def step(self) -> list[WrittenText]:
        """One forward pass; the texts that it has ended."""
        outputs, _ = self._core.step()
        states = self._hook.collect() if self._hook is not None else None
        if states is not None:
            for key, known, row in zip(states.keys, states.outputs, states.rows, strict=True):
                self._texts[key].states[known] = row.copy()  # of a prompt in several chunks the last one stays
        ended: list[WrittenText] = []
        for output in outputs[0].outputs if outputs else ():
            text = self._texts[output.request_id]
            text.ids += output.new_token_ids
            if output.finish_reason is not None:
                text.reason = str(output.finish_reason)
                ended.append(self._texts.pop(text.key))
        return ended

    def _hooked(self) -> dict[str, int]:
        counts = {key: len(text.ids) for key, text in self._texts.items()}
        return {key: count for key, count in counts.items() if count % self._every == 0}

    def close(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        if self._hook is not None:
            self._hook.close()
        self._core.shutdown()
        cleanup_dist_env_and_memory()
