"""Hidden states out of the model's own forward pass, while it computes: nothing is computed twice.

A forward hook on each tapped layer copies the rows that are wanted, the last one of a request in a step; the others
cost nothing. Only Python that runs calls hooks: a compiled model, one in a CUDA graph and one in other processes
give no states, silently, and are refused here. docs/predictor.md says what they would need.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tetri.engine.base import EngineError, HiddenStates


class LayerHook:
    """Implements tetri.engine.base.Tap on a vLLM engine core. `layers`: after how many layers the state is taken,
    ascending. `wanted` is asked in the midst of each step: ids of requests, and how many output tokens they have; those
    that compute nothing in this step may be among them. Raises EngineError, one line, when no states would come."""

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
        self._ends = torch.empty(0, dtype=torch.int64)  # rows of the step that are taken
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
    """Whether vLLM's configuration is one in which hooks are called, with one row a request and step behind the last of
    its tokens. Raises EngineError."""
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
    """The modules that are the last of the first so many layers. Raises EngineError."""
    stacks: dict[str, dict[int, Any]] = {}
    for name, module in model.named_modules():
        match = re.fullmatch(r"((?:.*\.)?layers)\.(\d+)", name)
        if match and not re.search(r"(^|\.)layers\.\d+\.", name):  # layers inside a layer are not the model's
            stacks.setdefault(match[1], {})[int(match[2]) + 1] = module
    if len(stacks) != 1:
        found = f"several: {', '.join(stacks)}" if stacks else "none"
        raise EngineError(f"hidden states are taken behind one stack of modules `layers.N`; this model has {found}")
    ((_, layers),) = stacks.items()
    for layer in wanted:
        if layer not in layers:
            raise EngineError(f"hidden states come from behind layers 1 to {len(layers)} of this model, not {layer}")
    return [layers[layer] for layer in wanted]
