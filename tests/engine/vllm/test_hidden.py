"""Hidden states out of the live engine, against those of transformers and of the offline writer, in float32."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from handover import Pair, Request, crowd, engine_request
from states import FAR, NEAR, by_transformers, distance
from vllm_process import WRITER_LAYERS, EngineProcess

from tetri.engine.base import StepDone
from tetri.request import Sampling

pytestmark = [pytest.mark.model, pytest.mark.timeout(400)]

LENGTHS = (5, 129, 600)  # 600: two chunks live, five of the writer's
EVERY = 4
TEXT = Sampling(max_tokens=10, temperature=0.7, seed=5, ignore_eos=True)


@pytest.fixture
def engine(engine) -> Iterator[EngineProcess]:
    engine.hook_hidden_states(WRITER_LAYERS, EVERY)
    yield engine
    engine.step()
    engine.untap()


@pytest.fixture(scope="module")
def texts(prompts) -> list[list[int]]:
    source = next(prompt for prompt in prompts if len(prompt) == 2000)
    return [source[11 * place : 11 * place + length] for place, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def right(model):
    return by_transformers(model, WRITER_LAYERS)


class Live(Pair):
    """Both phases in one engine. `states`: of (key, outputs) the row that was taken."""

    def __init__(self, engine: EngineProcess) -> None:
        super().__init__(engine, engine)
        self.states: dict[tuple[str, int], np.ndarray] = {}

    def step(self, engine: EngineProcess) -> StepDone:
        done = engine.step()
        if (collect := engine.collect()) is not None:
            for key, outputs, row in zip(collect.keys, collect.outputs, collect.rows, strict=True):
                assert (key, outputs) not in self.states, "told twice"
                self.states[key, outputs] = row
        assert engine.collect() is None, "once"
        return done

    def serve(self, given: dict[str, list[int]], output_from: int = -1) -> dict[str, list[int]]:
        """All of `given` at once: their output."""
        requests = [Request(key, tokens, TEXT, output_from) for key, tokens in given.items()]
        self.carry(*requests)
        return {request.key: request.ids for request in requests}


def test_states_are_those_of_transformers(engine, writer, texts, right, capsys):
    """Three prompts batched with each other, one of them in two chunks, and their decodes; and the same texts by the
    offline writer."""
    live, given = Live(engine), {str(place): tokens for place, tokens in enumerate(texts)}
    ids = live.serve(given)
    written, _ = writer.write({key: (tokens, TEXT) for key, tokens in given.items()})
    assert ids == {key: text.ids for key, text in written.items()}
    worst = 0.0
    for key, tokens in given.items():
        rows = right([*tokens, *ids[key]])
        found = {outputs: row for (leg, outputs), row in live.states.items() if leg[1:] == key}
        assert set(found) == set(written[key].states) == {0, 4, 8} and (f"p{key}", 0) in live.states
        for states in (found, written[key].states):
            for outputs, row in states.items():
                worst = max(worst, distance(row, rows[len(tokens) + outputs - 1]))
                assert distance(row, rows[len(tokens) + outputs - 2]) > FAR
    with capsys.disabled():
        print(f" {worst:.1e} from transformers ", end="")
    assert worst < NEAR


def test_output_of_an_earlier_attempt_counts(engine, texts, right):
    """A request that starts over with five tokens of output behind its prompt."""
    prompt, first, second = texts[1], Live(engine), Live(engine)
    ids = first.serve({"x": prompt})["x"]
    assert second.serve({"x": [*prompt, *ids[:5]]}, output_from=len(prompt))["x"] == ids[5:]
    assert set(second.states) == {("px", 5), ("dx", 8)}
    rows = right([*prompt, *ids])
    assert distance(second.states["px", 5], rows[len(prompt) + 4]) < NEAR
    assert distance(second.states["dx", 8], first.states["dx", 8]) < NEAR


def test_a_request_that_stays_tells_the_same_states(engine, texts):
    moved, local = Live(engine), Live(engine)
    ids = moved.serve({"x": texts[2]})["x"]
    engine.add(engine_request("px", "prefill", texts[2], TEXT))
    engine.stay("px", "dx")
    tokens = []
    while engine.engine_requests():
        for sampled in local.step(engine).tokens:
            tokens.append(sampled.token)
            if sampled.key == "px":
                engine.admit("dx", sampled.token)
    assert tokens == ids and {*local.states} == {*moved.states} == {("px", 0), ("dx", 4), ("dx", 8)}
    for key, row in moved.states.items():
        assert distance(local.states[key], row) < NEAR


def test_a_preempted_leg_tells_each_state_once_and_rightly(engine, texts, right):
    """It is computed again when the other has gone."""
    engine.hook_hidden_states(WRITER_LAYERS, 1)
    prompt, live = texts[2][:127], Live(engine)
    ballast = crowd(engine, prompt)
    steps = [live.step(engine)]
    while not steps[-1].preempted:
        steps.append(live.step(engine))
    before = {outputs for key, outputs in live.states if key == "x"}
    for key in ballast:
        engine.cancel(key)
    steps.append(live.step(engine))
    while engine.engine_requests():
        steps.append(live.step(engine))
    ids = [5, *(token.token for step in steps for token in step.tokens if token.key == "x")]
    assert any(span.key == "x" and span.start == 0 for step in steps for span in step.spans), "computed again"
    assert [outputs for key, outputs in live.states if key == "x"] == list(range(1, 10))
    rows = right([*prompt, *ids])
    recomputed = set(range(1, 10)) - before
    assert recomputed
    for outputs in recomputed:
        assert distance(live.states["x", outputs], rows[127 + outputs - 1]) < NEAR


def test_a_leg_that_ends_by_its_first_token_or_is_cancelled(engine, texts, right):
    live = Live(engine)
    engine.add(engine_request("one", "prefill", texts[0], Sampling(max_tokens=1, ignore_eos=True)))
    engine.add(engine_request("gone", "prefill", texts[1]))
    engine.add(engine_request("half", "prefill", texts[2]))
    engine.step()
    engine.cancel("gone")
    engine.cancel("half")
    collect = engine.collect()
    assert collect.keys == ("one", "gone") and collect.outputs == (0, 0), "a chunk that is not the last tells nothing"
    assert distance(collect.rows[0], right(texts[0])[-1]) < NEAR
    engine.add(engine_request("gone", "prefill", texts[0]))
    live.step(engine)
    assert distance(live.states["gone", 0], right(texts[0])[-1]) < NEAR and len(live.states) == 1


def test_held_and_idle_steps_tell_nothing_and_a_closed_tap_neither(engine, texts):
    engine.step()
    assert engine.collect() is None
    engine.add(engine_request("x", "prefill", texts[0]))
    engine.hold("x", True)
    engine.step()
    assert engine.collect() is None
    engine.untap()
    engine.hold("x", False)
    assert engine.step().tokens and engine.collect() is None
