"""The predictor of kind `hidden`: what the main model's own hidden states say of output lengths, told with the step
that has computed them (paper, section 3.3, without a second model)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tetri.engine.base import Engine, EngineError, Tap, Tappable
from tetri.leg import Foretold, StepDone
from tetri.request import Odds


class Head(Protocol):
    """tetri.predict.model.Loaded, of kind hidden."""

    @property
    def layer(self) -> int: ...

    @property
    def every(self) -> int: ...

    def foretell(self, states: Any, outputs: Sequence[int]) -> list[Odds]:
        """`states` [n, hidden]; raises PredictError when they are of another model."""


def foretelling(engine: Engine, head: Head) -> Callable[[int], StepDone]:
    """The engine's `step`, from now on with `StepDone.foretold`. Raises EngineError, one line, when the engine gives no
    hidden states, and PredictError when the head is for a model of another size."""
    if not isinstance(engine, Tappable):
        raise EngineError(
            f"an engine of kind {engine.fingerprint.engine} has no hidden states to predict lengths from: "
            "set engine.kind = 'vllm' or another predictor.kind"
        )
    tap = engine.tap([head.layer], head.every)
    try:
        head.foretell([[0.0] * tap.hidden], [0])  # here, and not in the first step, it may fail
    except BaseException:
        tap.close()  # `auto` goes on with the engine
        raise

    def step(most: int = 1) -> StepDone:
        done = engine.step(most)
        told = foretold(tap, head)
        return dataclasses.replace(done, foretold=told) if told else done

    return step


def foretold(tap: Tap, head: Head) -> tuple[Foretold, ...]:
    """What the head says of the states that the last step took."""
    states = tap.taken()
    if states is None:
        return ()
    odds = head.foretell(states.rows[:, 0], states.outputs)
    return tuple(Foretold(*each) for each in zip(states.keys, states.outputs, odds, strict=True))
