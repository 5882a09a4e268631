"""A step tells what the hidden states that it took foretell."""

from __future__ import annotations

import numpy as np
import pytest

from tests.engine.driving import engine_request, prompt, run
from tetri.cost import Cost
from tetri.engine.base import EngineError, HiddenStates
from tetri.engine.emulated import EmulatedEngine
from tetri.engine_request import HiddenStateEstimate, StepDone
from tetri.instance import Capacity
from tetri.predict.lengths import PredictError
from tetri.proc.hidden import estimating
from tetri.request import LengthDistribution

HIDDEN = 3
CAPACITY = Capacity(blocks=12, block_tokens=32, chunk_tokens=64, max_batch=4, context=256)


class Head:
    """Says of a state that as many tokens follow as its first number."""

    layer, every = 16, 64

    def __init__(self):
        self.asked = []

    def estimate(self, states, outputs):
        states = np.asarray(states)
        if states.shape[1] != HIDDEN:
            raise PredictError(f"states of {HIDDEN} numbers are needed")
        self.asked.append((states.tolist(), list(outputs)))
        return [distribution(row[0]) for row in states]


def distribution(count):
    return LengthDistribution(100, tuple(float(bucket == count) for bucket in range(4)))


class Engine(EmulatedEngine):
    """The emulated engine with states: [3] and the number of output tokens, of each leg that has run."""

    hidden = HIDDEN
    untapped = False

    def hook_hidden_states(self, layers, every):
        self.observed, self.states = (list(layers), every), None
        return self

    def close(self):
        self.untapped = True

    def collect(self):
        states, self.states = self.states, None
        return states

    def step(self, most=1, chunk=None):
        done = super().step(most, chunk)
        if done.spans:
            keys = tuple(span.key for span in done.spans)
            rows = np.array([[[3, 0, 0]], [[1, 0, 0]]], np.float32)[: len(keys)]
            self.states = HiddenStates(keys, tuple(range(0, 64 * len(keys), 64)), rows)
        return done


def made(kind=Engine):
    return kind(capacity=CAPACITY, token_bytes=8, vocabulary=100, cost=Cost())


def test_what_is_foretold_comes_with_the_step_that_took_it():
    engine, head = made(), Head()
    step = estimating(engine, head)
    assert engine.observed == ([16], 64) and len(head.asked) == 1, "tried once"
    for key in "ab":
        engine.add(engine_request(key, "prefill", prompt(20), max_tokens=1))
    done = step(1)
    assert done.estimates == (
        HiddenStateEstimate("a", 0, distribution(3)),
        HiddenStateEstimate("b", 64, distribution(1)),
    )
    assert [token.key for token in done.tokens] == ["a", "b"] and len(done.spans) == 2, "and all else that it says"
    assert head.asked[1] == ([[3, 0, 0], [1, 0, 0]], [0, 64])


def test_a_step_has_the_passes_and_the_chunk_that_it_was_asked_for():
    engine = made()
    engine.add(engine_request("a", "prefill", prompt(20), max_tokens=3))
    step = estimating(engine, Head())
    assert [span.stop for span in step(1, 7).spans] == [7]
    engine.stay("a", "d")
    (first,) = step(1).tokens
    engine.admit("d", first.token)
    assert step(5).steps == 2


def test_a_step_that_took_nothing_asks_nobody():
    engine, head = made(), Head()
    step = estimating(engine, head)
    assert step() == StepDone() and len(head.asked) == 1


def test_an_engine_without_a_model_is_refused():
    with pytest.raises(EngineError, match="^an engine of kind emulated has no hidden states.*engine.kind = 'vllm'"):
        estimating(made(EmulatedEngine), Head())


def test_a_head_for_a_model_of_another_size_is_refused_at_start():
    class Wide(Engine):
        hidden = 5

    engine = made(Wide)
    with pytest.raises(PredictError, match="states of 3 numbers"):
        estimating(engine, Head())
    assert engine.untapped, "auto goes on with this engine"


def test_without_a_head_nothing_is_tapped():
    engine = made()
    engine.add(engine_request("a", "prefill", prompt(20), max_tokens=1))
    assert run(engine, "a")[2][0].estimates == () and not hasattr(engine, "tapped")
