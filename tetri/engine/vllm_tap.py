"""Hidden states out of the model's own forward pass, while it computes: nothing is computed twice.

A forward hook on each tapped layer copies the rows that are wanted, the last one of a request in a step; the others
cost nothing. That needs vLLM in eager mode, as it runs here: a compiled graph calls no hooks (vLLM's own way there is
the `aux_hidden_states` of its models, made for EAGLE). With tensor parallelism the rows are the same on every rank,
since each layer ends in an all-reduce, but have to come back from a worker process with the step's output.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

import torch

from tetri.engine.base import EngineError


class Tap:
    """`layers`: after how many layers the state is taken, ascending. `wanted`: ids of the requests whose last row of
    the next step is to be taken; `taken` by then float32 [layers, hidden] by id, on the CPU."""

    def __init__(self, runner: Any, layers: Sequence[int]) -> None:
        self._runner = runner
        self._hooks = [module.register_forward_hook(self._take) for module in _layers(runner.get_model(), layers)]
        self._rows: list[int] = []
        self._states: list[torch.Tensor] = []
        self.layers = tuple(layers)
        self.wanted: Collection[str] = ()
        self.taken: dict[str, torch.Tensor] = {}

    def _take(self, module: Any, given: Any, output: Any) -> None:
        if not self.wanted:
            return
        if not self._states:
            ids = self._runner.input_batch.req_ids
            self._rows = [row for row, key in enumerate(ids) if key in self.wanted]
        hidden = output[0] if isinstance(output, tuple) else output
        ends = self._runner.query_start_loc.cpu[1:][self._rows].to(hidden.device) - 1
        state = hidden[ends].float()
        if isinstance(output, tuple) and output[1] is not None:  # vLLM adds the residual in the next layer's norm
            state += output[1][ends].float()
        self._states.append(state)

    def step_over(self) -> dict[str, torch.Tensor]:
        """What the step took."""
        self.taken = {}
        if self._states:
            ids = self._runner.input_batch.req_ids
            states = torch.stack(self._states, dim=1).cpu()
            self.taken = {ids[row]: state for row, state in zip(self._rows, states, strict=True)}
            self._states = []
        return self.taken

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _layers(model: Any, wanted: Sequence[int]) -> list[Any]:
    """Raises EngineError when the model has no such layers."""
    found: dict[int, Any] = {}
    for name, module in model.named_modules():
        if match := re.fullmatch(r"(?:.*\.)?layers\.(\d+)", name):
            found[int(match[1]) + 1] = module
    for layer in wanted:
        if layer not in found:
            raise EngineError(f"the model has no layer {layer} to take hidden states from: it has {len(found)}")
    return [found[layer] for layer in wanted]
