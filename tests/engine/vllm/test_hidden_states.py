"""Which rows a tap takes, on a model of three layers that only add, and where it says that none would come."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tetri.engine.base import EngineError
from tetri.engine.vllm.hidden_states import LayerHook

HIDDEN = 4


class Layer(torch.nn.Module):
    """Adds its number to the residual, by vLLM's way of two halves, or by the plain one."""

    def __init__(self, number, halves):
        super().__init__()
        self.number, self.halves = number, halves

    def forward(self, hidden, residual):
        if not self.halves:
            return hidden + self.number
        residual = hidden if residual is None else hidden + residual
        return torch.full_like(hidden, self.number), residual


class Model(torch.nn.Module):
    def __init__(self, layers=3, halves=True, stack="layers"):
        super().__init__()
        self.model = torch.nn.Module()
        setattr(self.model, stack, torch.nn.ModuleList(Layer(10**n, halves) for n in range(layers)))

    def forward(self, hidden):
        residual = None
        for layer in self.model.layers:
            output = layer(hidden, residual)
            hidden, residual = output if isinstance(output, tuple) else (output, None)


class Core:
    """What a tap sees of vLLM. A step computes so many tokens of each request, token i of the step being of value i."""

    def __init__(self, model, **config):
        self.model, self.wanted = model, {}
        self.runner = SimpleNamespace(
            device=torch.device("cpu"), get_model=lambda: model, input_batch=None, query_start_loc=None
        )
        worker = SimpleNamespace(worker=SimpleNamespace(model_runner=self.runner))
        self.model_executor = SimpleNamespace(driver_worker=worker)
        self.vllm_config = configured(**config)

    def hook(self, *layers):
        return LayerHook(self, layers, lambda: self.wanted)

    def step(self, counts, wanted):
        self.wanted = wanted
        starts = torch.tensor([0, *counts.values(), 0, 0]).cumsum(0)  # vLLM's buffer is longer than the batch
        self.runner.input_batch = SimpleNamespace(req_ids=list(counts))
        self.runner.query_start_loc = SimpleNamespace(cpu=starts)
        with torch.inference_mode():
            self.model(torch.arange(sum(counts.values()), dtype=torch.float32)[:, None].expand(-1, HIDDEN).clone())


def configured(ranks=1, mode="NONE", graphs="NONE", second=False, drafts=None):
    mode, graphs = SimpleNamespace(name=mode), SimpleNamespace(name=graphs)
    return SimpleNamespace(
        parallel_config=SimpleNamespace(world_size=ranks),
        compilation_config=SimpleNamespace(mode=mode, cudagraph_mode=graphs),
        model_config=SimpleNamespace(get_hidden_size=lambda: HIDDEN),
        use_v2_model_runner=second,
        speculative_config=drafts,
    )


@pytest.mark.parametrize("halves", [True, False], ids=["hidden and residual", "hidden alone"])
def test_the_last_row_of_each_that_is_wanted_behind_each_layer(halves):
    core = Core(Model(halves=halves))
    hook = core.hook(1, 3)
    core.step({"a": 3, "b": 1, "c": 5}, {"c": 0, "a": 64, "waits": 128})
    collect = hook.collect()
    assert (collect.keys, collect.outputs) == (("a", "c"), (64, 0))
    assert collect.rows.shape == (2, 2, HIDDEN) and collect.rows.dtype.name == "float32"
    assert collect.rows[:, :, 0].tolist() == [[3.0, 113.0], [9.0, 119.0]]  # tokens 2 and 8; + 1, + 1 + 10 + 100
    assert hook.collect() is None


def test_a_step_in_which_nobody_is_wanted_takes_nothing():
    core = Core(Model())
    hook = core.hook(2)
    for wanted in ({}, {"waits": 0}):
        core.step({"a": 2}, wanted)
        assert hook.collect() is None


def test_what_nobody_asked_for_gives_way_to_the_next_step():
    core = Core(Model())
    hook = core.hook(2)
    core.step({"a": 2}, {"a": 0})
    core.step({"b": 1}, {"b": 0})
    assert hook.collect().keys == ("b",)
    core.step({"a": 2}, {"a": 0})
    core.step({"b": 1}, {})
    assert hook.collect() is None


def test_a_closed_tap_leaves_no_hook():
    core = Core(Model())
    hook, other = core.hook(1, 2), core.hook(3)
    hook.close()
    core.step({"a": 2}, {"a": 0})
    assert hook.collect() is None and other.collect().keys == ("a",)
    assert hook.hidden == HIDDEN


def test_layers_in_layers_are_not_the_models():
    model = Model()
    model.model.layers[1].layers = torch.nn.ModuleList(torch.nn.Identity() for _ in range(9))
    assert Core(model).hook(3).hidden == HIDDEN
    with pytest.raises(EngineError, match="layers 1 to 3 of this model, not 4$"):
        Core(model).hook(4)


@pytest.mark.parametrize(
    ("core", "why"),
    [
        (lambda: Core(Model(), ranks=2), "a model on 2 ranks"),
        (lambda: Core(Model(), mode="VLLM_COMPILE"), "a compiled model .mode VLLM_COMPILE, CUDA graphs NONE"),
        (lambda: Core(Model(), graphs="FULL"), "a compiled model .mode NONE, CUDA graphs FULL"),
        (lambda: Core(Model(), second=True), "second model runner"),
        (lambda: Core(Model(), drafts=object()), "speculative decoding"),
        (lambda: Core(Model(stack="h")), "this model has none$"),
        (lambda: Core(torch.nn.ModuleDict({"eye": Model(), "text": Model()})), "eye.model.layers, text.model.layers$"),
        (lambda: Core(Model()), "layers 1 to 3 of this model, not 9$"),
    ],
)
def test_where_no_states_would_come_it_says_so(core, why):
    with pytest.raises(EngineError, match=why) as caught:
        core().hook(9)
    assert "\n" not in str(caught.value)
