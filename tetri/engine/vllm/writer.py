"""Writes whole texts with vLLM in one process, in batches, for offline tools. It uses the same sampler as serving, so a
text depends only on its prompt and seed, not on its batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tetri.engine.base import EngineError
from tetri.engine.vllm.sampler import vllm_params
from tetri.engine.vllm.setup import VllmSettings, engine_config, prepare_environment, start_core, stop_ids
from tetri.engine_request import INVALID
from tetri.request import Sampling, Token

BLOCK_TOKENS = 128


def _report(tokens: tuple[Token, ...]) -> None:
    if not tokens:
        raise EngineError(INVALID)


@dataclass(slots=True)
class WrittenText:
    """A text of the model: its token `ids`, and the `reason` for its end, "stop" or "length". `states`: number of
    output tokens -> hidden state of the last token then, float32 [layers, hidden]; 0 is the end of the prompt."""

    key: str
    ids: list[int] = field(default_factory=list)
    reason: str = ""
    states: dict[int, Any] = field(default_factory=dict)


class Writer:
    """Writes texts of at most `context` tokens, prompt and output together. `batch`: most texts at a time; the caller
    respects it. `layers`: numbers of layers after which hidden states are kept, at the end of the prompt and every
    `every` output tokens. Raises EngineError when the checkpoint cannot be loaded."""

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
        """Start a text. Raises EngineError when prompt and `max_tokens` do not fit into the context."""
        from vllm.v1.request import Request

        if not prompt or len(prompt) + sampling.max_tokens > self.context:
            raise EngineError(
                f"{len(prompt)} prompt tokens and up to {sampling.max_tokens} of output are not within"
                f" {self.context} tokens of context"
            )
        params = vllm_params(sampling, len(prompt), sampling.max_tokens, self._stop_ids, self._vocab, _report)
        self._texts[key] = WrittenText(key)
        self._core.scheduler.add_request(Request(key, list(prompt), params, None))

    def step(self) -> list[WrittenText]:
        """Run one forward pass; returns the texts that ended in it."""
        outputs, _ = self._core.step()
        states = self._hook.collect() if self._hook is not None else None
        if states is not None:
            for key, known, row in zip(states.keys, states.outputs, states.rows, strict=True):
                self._texts[key].states[known] = row.copy()  # the last chunk of a prompt overwrites the earlier ones
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
