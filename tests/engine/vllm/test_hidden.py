"""Hidden states out of the live engine, against those of transformers and of the offline writer, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from handover import adopt_zeros, engine_request, fill
from states import FAR, NEAR, by_transformers, distance
from vllm_process import WRITER_LAYERS, EngineProcess

from tetri.engine.base import EngineError
from tetri.request import Sampling, blocks_for

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


@dataclass
class Live:
    """An engine that prefills, then decodes, what it is given; `states`: of (key, outputs) the row that was taken."""

    engine: EngineProcess
    ids: dict[str, list[int]] = field(default_factory=dict)
    states: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)

    def step(self):
        done = self.engine.step()
        if (collect := self.engine.collect()) is not None:
            for key, outputs, row in zip(collect.keys, collect.outputs, collect.rows, strict=True):
                assert (key, outputs) not in self.states, "told twice"
                self.states[key, outputs] = row
        assert self.engine.collect() is None, "once"
        return done

    def serve(self, given: dict[str, list[int]], output_from=None, sampling=TEXT):
        """All of `given` at once. A request's two legs are called by its key, with p and d before it."""
        copies = {}
        for key, tokens in given.items():
            self.engine.add(engine_request(f"p{key}", "prefill", tokens, sampling, output_from))
        while len(copies) < len(given):
            for token in self.step().tokens:
                key = token.key[1:]
                self.ids[key] = [token.token]
                copies[key] = self.engine.export(token.key, 0, blocks_for(len(given[key]), 128))
        for key, tokens in given.items():
            self.engine.add(engine_request(f"d{key}", "decode", tokens, sampling, output_from))
        assert len(self.step().allocated) == len(given)
        for key in given:
            self.engine.adopt(f"d{key}", 0, copies[key])
            self.engine.admit(f"d{key}", self.ids[key][0])
        running = set(given)
        while running:
            for token in self.step().tokens:
                self.ids[token.key[1:]].append(token.token)
                running -= {token.key[1:]} if token.reason else set()


def test_states_are_those_of_transformers(engine, texts, right, capsys):
    """Three prompts batched with each other, one of them in two chunks, then their decodes in one batch."""
    live = Live(engine)
    live.serve({str(place): tokens for place, tokens in enumerate(texts)})
    assert set(live.states) == {
        (f"{engine_request}{n}", k) for n in range(3) for engine_request, k in (("p", 0), ("d", 4), ("d", 8))
    }
    worst = 0.0
    for place, tokens in enumerate(texts):
        rows = right([*tokens, *live.ids[str(place)]])
        for (key, outputs), row in live.states.items():
            if key[1:] == str(place):
                worst = max(worst, distance(row, rows[len(tokens) + outputs - 1]))
                assert distance(row, rows[len(tokens) + outputs - 2]) > FAR
    with capsys.disabled():
        print(f" {worst:.1e} from transformers ", end="")
    assert worst < NEAR


def test_alone_batched_and_of_the_writer_they_are_the_same(engine, writer, texts, capsys):
    together, alone = Live(engine), Live(engine)
    together.serve({str(place): tokens for place, tokens in enumerate(texts)})
    for place, tokens in enumerate(texts):
        alone.serve({str(place): tokens})
    written, _ = writer.write({str(place): (tokens, TEXT) for place, tokens in enumerate(texts)})
    assert together.states.keys() == alone.states.keys() and together.ids == alone.ids
    assert together.ids == {key: text.ids for key, text in written.items()}
    batched = max(distance(row, alone.states[name]) for name, row in together.states.items())
    offline = [distance(row, written[key[1:]].states[outputs]) for (key, outputs), row in together.states.items()]
    assert len(offline) == sum(len(text.states) for text in written.values()) == 9
    with capsys.disabled():
        print(f" {batched:.1e} batched from alone, {max(offline):.1e} from the writer ", end="")
    assert batched < NEAR and max(offline) < NEAR


def test_output_of_an_earlier_attempt_counts(engine, texts, right):
    """A request that starts over with five tokens of output behind its prompt."""
    prompt, first, second = texts[1], Live(engine), Live(engine)
    first.serve({"x": prompt})
    tokens = [*prompt, *first.ids["x"][:5]]
    second.serve({"x": tokens}, output_from=len(prompt))
    assert first.ids["x"] == [*tokens[len(prompt) :], *second.ids["x"]]
    assert set(second.states) == {("px", 5), ("dx", 8)}
    rows = right([*prompt, *first.ids["x"]])
    assert distance(second.states["px", 5], rows[len(prompt) + 4]) < NEAR
    assert distance(second.states["dx", 8], first.states["dx", 8]) < NEAR


def test_a_preempted_leg_tells_each_state_once_and_rightly(engine, texts, right):
    """Two legs of one block each and one free block: who wants another one second is preempted, and computed again
    when the other has gone."""
    engine.hook_hidden_states(WRITER_LAYERS, 1)
    prompt, live = texts[2][:127], Live(engine)
    ballast = fill(engine, leave=3)
    for key in ("first", "x"):
        engine.add(engine_request(key, "decode", prompt, TEXT))
        engine.step()
        adopt_zeros(engine, key, prompt)
        engine.admit(key, 5)
    steps = [live.step()]
    while not steps[-1].preempted:
        steps.append(live.step())
    before = {outputs for key, outputs in live.states if key == "x"}
    for key in ballast:
        engine.cancel(key)
    steps.append(live.step())
    while engine.engine_requests():
        steps.append(live.step())
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
    live.step()
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


def test_where_no_states_would_come_it_is_said_in_one_line(engine):
    for layers, every, why in (
        ([31], 64, "after layers 1 to 30 of this model, not 31"),
        ([0], 64, "after layers 1 to 30 of this model, not 0"),
        ([16], 0, "interval of at least 1 token, got 0"),
    ):
        with pytest.raises(EngineError, match=why) as caught:
            engine.hook_hidden_states(layers, every)
        assert "\n" not in str(caught.value)
    compiled, ranks = engine.refused_taps([{"enforce_eager": False}, {}, {"tensor_parallel_size": 3}])
    assert "compiled model (mode " in compiled and "on 3 ranks" in ranks
    assert "\n" not in compiled + ranks
