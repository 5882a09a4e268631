"""The predictor of kind `hidden`: predicts output lengths from the hidden states of the main model, in the step that
computes them (paper, section 3.3, but without a second model)."""

from __future__ import annotations

from collections.abc import Callable

from tetri.engine.base import Engine, EngineError, HiddenStateHook, SupportsHiddenStates
from tetri.engine_request import HiddenStateEstimate, StepDone
from tetri.predict.serve import EstimatorHead


def estimating(engine: Engine, head: EstimatorHead) -> Callable[[int, int | None], StepDone]:
    """Return the engine's `step`, extended by `StepDone.estimates`. Raises EngineError when the engine has no hidden
    states, and PredictError when the head is for hidden states of another size."""
    if not isinstance(engine, SupportsHiddenStates):
        lacks = f"an engine of kind {engine.fingerprint.engine} has no hidden states to predict lengths from"
        raise EngineError(f"{lacks}: set engine.kind = 'vllm' or another predictor.kind")
    hook = engine.hook_hidden_states([head.layer], head.every)
    try:
        head.estimate([[0.0] * hook.hidden], [0])  # fail here instead of in the first step
    except BaseException:
        hook.close()  # with kind `auto`, the engine serves without the head
        raise

    def step(most: int = 1, chunk: int | None = None) -> StepDone:
        done = engine.step(most, chunk)
        found = estimates(hook, head)
        return done.changed(estimates=found) if found else done

    return step


def estimates(hook: HiddenStateHook, head: EstimatorHead) -> tuple[HiddenStateEstimate, ...]:
    """The head's predictions for the hidden states of the last step."""
    states = hook.collect()
    if states is None:
        return ()
    distribution = head.estimate(states.rows[:, 0], states.outputs)
    return tuple(HiddenStateEstimate(*each) for each in zip(states.keys, states.outputs, distribution, strict=True))
