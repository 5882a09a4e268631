"""A step tells what the hidden states that it took foretell."""

from __future__ import annotations

import numpy as np
import pytest

from tests.engine.driving import leg, prompt, run
from tetri.cost import Cost
from tetri.engine.base import EngineError, HiddenStates
from tetri.engine.emulated import EmulatedEngine
from tetri.leg import Foretold, StepDone
from tetri.predict.lengths import PredictError
from tetri.proc.hidden import foretelling
from tetri.request import Capacity, Odds

HIDDEN = 3
CAPACITY = Capacity(blocks=12, block_tokens=32, chunk_tokens=64, max_batch=4, context=256)


class Head:
    """Says of a state that as many tokens follow as its first number."""

    layer, every = 16, 64

    def __init__(self):
        self.asked = []

    def foretell(self, states, outputs):
        states = np.asarray(states)
        if states.shape[1] != HIDDEN:
            raise PredictError(f"states of {HIDDEN} numbers are needed")
        self.asked.append((states.tolist(), list(outputs)))
        return [odds(row[0]) for row in states]


def odds(count):
    return Odds(100, tuple(float(bucket == count) for bucket in range(4)))


class Engine(EmulatedEngine):
    """The emulated engine with states: [3] and the number of output tokens, of each leg that has run."""

    hidden = HIDDEN
    untapped = False

    def tap(self, layers, every):
        self.tapped, self.states = (list(layers), every), None
        return self

    def close(self):
        self.untapped = True

    def taken(self):
        states, self.states = self.states, None
        return states

    def step(self, most=1):
        done = super().step(most)
        if done.spans:
            keys = tuple(span.key for span in done.spans)
            rows = np.array([[[3, 0, 0]], [[1, 0, 0]]], np.float32)[: len(keys)]
            self.states = HiddenStates(keys, tuple(range(0, 64 * len(keys), 64)), rows)
        return done


def made(kind=Engine):
    return kind(capacity=CAPACITY, token_bytes=8, vocabulary=100, cost=Cost())


def test_what_is_foretold_comes_with_the_step_that_took_it():
    engine, head = made(), Head()
    step = foretelling(engine, head)
    assert engine.tapped == ([16], 64) and len(head.asked) == 1, "tried once"
    for key in "ab":
        engine.add(leg(key, "prefill", prompt(20), max_tokens=1))
    done = step(1)
    assert done.foretold == (Foretold("a", 0, odds(3)), Foretold("b", 64, odds(1)))
    assert [token.key for token in done.tokens] == ["a", "b"] and len(done.spans) == 2, "and all else that it says"
    assert head.asked[1] == ([[3, 0, 0], [1, 0, 0]], [0, 64])


def test_a_step_that_took_nothing_asks_nobody():
    engine, head = made(), Head()
    step = foretelling(engine, head)
    assert step() == StepDone() and len(head.asked) == 1


def test_an_engine_without_a_model_is_refused():
    with pytest.raises(EngineError, match="^an engine of kind emulated has no hidden states.*engine.kind = 'vllm'"):
        foretelling(made(EmulatedEngine), Head())


def test_a_head_for_a_model_of_another_size_is_refused_at_start():
    class Wide(Engine):
        hidden = 5

    engine = made(Wide)
    with pytest.raises(PredictError, match="states of 3 numbers"):
        foretelling(engine, Head())
    assert engine.untapped, "auto goes on with this engine"


def test_without_a_head_nothing_is_tapped():
    engine = made()
    engine.add(leg("a", "prefill", prompt(20), max_tokens=1))
    assert run(engine, "a")[2][0].foretold == () and not hasattr(engine, "tapped")
