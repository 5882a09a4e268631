"""The predictor of kind `hidden`: what the main model's own hidden states say of output lengths, told with the step
that has computed them (paper, section 3.3, without a second model)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tetri.engine.base import Engine, EngineError, HiddenStateHook, SupportsHiddenStates
from tetri.engine_request import HiddenStateEstimate, StepDone
from tetri.request import LengthDistribution


class Estimator(Protocol):
    """tetri.predict.model.Loaded, of kind hidden."""

    @property
    def layer(self) -> int: ...

    @property
    def every(self) -> int: ...

    def estimate(self, states: Any, outputs: Sequence[int]) -> list[LengthDistribution]:
        """`states` [n, hidden]; raises PredictError when they are of another model."""


def estimating(engine: Engine, head: Estimator) -> Callable[[int], StepDone]:
    """The engine's `step`, from now on with `StepDone.foretold`. Raises EngineError, one line, when the engine gives no
    hidden states, and PredictError when the head is for a model of another size."""
    if not isinstance(engine, SupportsHiddenStates):
        raise EngineError(
            f"an engine of kind {engine.fingerprint.engine} has no hidden states to predict lengths from: "
            "set engine.kind = 'vllm' or another predictor.kind"
        )
    hook = engine.hook_hidden_states([head.layer], head.every)
    try:
        head.estimate([[0.0] * hook.hidden], [0])  # here, and not in the first step, it may fail
    except BaseException:
        hook.close()  # `auto` goes on with the engine
        raise

    def step(most: int = 1) -> StepDone:
        done = engine.step(most)
        found = estimates(hook, head)
        return dataclasses.replace(done, estimates=found) if found else done

    return step


def estimates(hook: HiddenStateHook, head: Estimator) -> tuple[HiddenStateEstimate, ...]:
    """What the head says of the states that the last step took."""
    states = hook.collect()
    if states is None:
        return ()
    distribution = head.estimate(states.rows[:, 0], states.outputs)
    return tuple(HiddenStateEstimate(*each) for each in zip(states.keys, states.outputs, distribution, strict=True))
