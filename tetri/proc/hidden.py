"""The predictor of kind `hidden`: predicts output lengths from the hidden states of the main model, in the step that
computes them (paper, section 3.3, but without a second model)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tetri.engine.base import Engine, EngineError, HiddenStateHook, SupportsHiddenStates
from tetri.engine_request import HiddenStateEstimate, StepDone
from tetri.request import LengthDistribution


class Estimator(Protocol):
    """A head on hidden states, such as tetri.predict.model.Loaded of kind hidden."""

    @property
    def layer(self) -> int:
        """Number of layers after which the hidden state is read."""

    @property
    def every(self) -> int:
        """Output tokens between two reads of the hidden state."""

    def estimate(self, states: Any, outputs: Sequence[int]) -> list[LengthDistribution]:
        """Distributions of the remaining tokens, for `states` [n, hidden] and the known output tokens of each. Raises
        PredictError when the states have another size."""


def estimating(engine: Engine, head: Estimator) -> Callable[[int], StepDone]:
    """Return the engine's `step`, extended by `StepDone.estimates`. Raises EngineError when the engine has no hidden
    states, and PredictError when the head is for hidden states of another size."""
    if not isinstance(engine, SupportsHiddenStates):
        raise EngineError(
            f"an engine of kind {engine.fingerprint.engine} has no hidden states to predict lengths from: "
            "set engine.kind = 'vllm' or another predictor.kind"
        )
    hook = engine.hook_hidden_states([head.layer], head.every)
    try:
        head.estimate([[0.0] * hook.hidden], [0])  # fail here instead of in the first step
    except BaseException:
        hook.close()  # with kind `auto`, the engine serves without the head
        raise

    def step(most: int = 1) -> StepDone:
        done = engine.step(most)
        found = estimates(hook, head)
        return dataclasses.replace(done, estimates=found) if found else done

    return step


def estimates(hook: HiddenStateHook, head: Estimator) -> tuple[HiddenStateEstimate, ...]:
    """The head's predictions for the hidden states of the last step."""
    states = hook.collect()
    if states is None:
        return ()
    distribution = head.estimate(states.rows[:, 0], states.outputs)
    return tuple(HiddenStateEstimate(*each) for each in zip(states.keys, states.outputs, distribution, strict=True))
