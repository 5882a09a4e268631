"""Collects hidden states during the model's own forward pass; nothing is computed twice.

A forward hook on each chosen layer copies the wanted rows: the last row of a request in a step. Other rows cost
nothing. Hooks run only in eager Python. A model that is compiled, in a CUDA graph or in other processes would silently
give no states, so it is refused here; docs/predictor.md says what such models would need.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tetri.engine.base import EngineError, HiddenStates


class LayerHook:
    """Implements HiddenStateHook of tetri.engine.base on a vLLM engine core. `layers`: numbers of layers after which to
    keep the state, ascending. `wanted()` is called inside each step; it returns request ids with their output tokens,
    and may include requests that do not run in the step. Raises EngineError when the model gives no states."""

    def __init__(self, core: Any, layers: Sequence[int], wanted: Callable[[], Mapping[str, int]]) -> None:
        check(core.vllm_config)
        self._runner = core.model_executor.driver_worker.worker.model_runner
        modules = layers_of(self._runner.get_model(), layers)
        self._hooks = [module.register_forward_hook(self._capture) for module in modules]
        self._hooks.append(modules[0].register_forward_pre_hook(self._begin))
        self.hidden: int = core.vllm_config.model_config.get_hidden_size()
        self._wanted = wanted
        self._keys: tuple[str, ...] = ()
        self._outputs: tuple[int, ...] = ()
        self._ends = torch.empty(0, dtype=torch.int64)  # rows of the step to copy
        self._states: list[torch.Tensor] = []

    def _begin(self, module: Any, given: Any) -> None:
        wanted, runner = self._wanted(), self._runner
        rows = [row for row, key in enumerate(runner.input_batch.req_ids) if key in wanted] if wanted else []
        self._keys = tuple(runner.input_batch.req_ids[row] for row in rows)
        self._outputs = tuple(wanted[key] for key in self._keys)
        self._states = []
        if rows:
            self._ends = runner.query_start_loc.cpu[1:][rows].to(runner.device) - 1

    def _capture(self, module: Any, given: Any, output: Any) -> None:
        if not self._keys:
            return
        hidden, residual = output if isinstance(output, tuple) else (output, None)
        state = hidden[self._ends].float()
        if residual is not None:  # vLLM adds it in the next layer's norm
            state += residual[self._ends].float()
        self._states.append(state)

    def collect(self) -> HiddenStates | None:
        if not self._states:
            return None
        rows = torch.stack(self._states, dim=1).cpu().numpy()
        self._states = []
        return HiddenStates(self._keys, self._outputs, rows)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def check(config: Any) -> None:
    """Raises EngineError unless vLLM's configuration calls hooks, with one sampled row for each request and step."""
    parallel, compiled = config.parallel_config, config.compilation_config
    if parallel.world_size > 1:
        raise EngineError(
            f"no hidden states come from a model on {parallel.world_size} ranks (tensor or pipeline parallelism): "
            "set another predictor.kind"
        )
    if compiled.mode.name != "NONE" or compiled.cudagraph_mode.name != "NONE":
        raise EngineError(
            f"no hidden states come from a compiled model (mode {compiled.mode.name}, CUDA graphs "
            f"{compiled.cudagraph_mode.name}): it must be eager, or set another predictor.kind"
        )
    if config.use_v2_model_runner:
        raise EngineError("no hidden states come from vLLM's second model runner: set VLLM_USE_V2_MODEL_RUNNER=0")
    if config.speculative_config is not None:
        raise EngineError("no hidden states come beside speculative decoding: set another predictor.kind")


def layers_of(model: Any, wanted: Sequence[int]) -> list[Any]:
    """The modules of the given layers, counted from 1. Raises EngineError when the model has no such layer, or not
    exactly one stack of layers."""
    stacks: dict[str, dict[int, Any]] = {}
    for name, module in model.named_modules():
        match = re.fullmatch(r"((?:.*\.)?layers)\.(\d+)", name)
        if match and not re.search(r"(^|\.)layers\.\d+\.", name):  # skip layers nested inside a layer
            stacks.setdefault(match[1], {})[int(match[2]) + 1] = module
    if len(stacks) != 1:
        found = f"several: {', '.join(stacks)}" if stacks else "none"
        raise EngineError(f"hidden states need exactly one stack of modules `layers.N`; this model has {found}")
    ((_, layers),) = stacks.items()
    for layer in wanted:
        if layer not in layers:
            raise EngineError(f"hidden states are available after layers 1 to {len(layers)} of this model, not {layer}")
    return [layers[layer] for layer in wanted]
