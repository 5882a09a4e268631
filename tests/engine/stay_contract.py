"""The part of the engine's contract (contract.py) on requests that stay where they were prefilled, and on steps with a
limited chunk."""

from __future__ import annotations

import pytest

from tests.engine.driving import adopt_all, computed, engine_request, prefill, prompt, run, stay
from tetri.engine.base import EngineError
from tetri.engine_request import Span, StepDone
from tetri.request import Sampling, token_ids

DRAWN = {"temperature": 0.9, "seed": 5}
PENALTIES = {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.5, "min_tokens": 4}


class StayContract:
    def text(self, tokens, **sampling):
        return self.right(tokens, Sampling(**{"max_tokens": 8, "ignore_eos": True, **sampling}))

    # ------------------------------------------------------------ requests that stay

    def test_a_request_that_stays_gets_the_tokens_of_one_engine_that_did_it_all(self, engine):
        for length in (1, 31, 32, 33, 64, 65, 160):
            tokens = prompt(length, salt=length)
            first = stay(engine, "p", "d", tokens)
            assert engine.step() == StepDone(), "it waits for its admission"
            engine.admit("d", first.token)
            outputs, reasons, steps = run(engine, "d")
            assert (first.key, first.reason, reasons) == ("p", None, {"d": "length"})
            assert [first.token, *outputs["d"]] == self.text(tokens)
            assert all(count == 1 for step in steps for count in computed(step).values()), "nothing again"

    @pytest.mark.parametrize("sampling", [DRAWN, PENALTIES, {**DRAWN, **PENALTIES}], ids=["drawn", "penalties", "both"])
    def test_local_and_adopted_requests_run_in_one_batch_and_each_gets_its_own(self, engine, sampling):
        prompts = {"a": prompt(40), "b": prompt(72), "c": prompt(16), "d": prompt(33)}
        asked = {key: sampling if key in "ab" else {} for key in prompts}
        first = {key: stay(engine, f"p{key}", key, prompts[key], **asked[key]) for key in "ac"}
        for key in "bd":
            copies, first[key] = prefill(engine, f"p{key}", prompts[key], **asked[key])
            engine.add(engine_request(key, "decode", prompts[key], **asked[key]))
            engine.step()
            engine.adopt(key, 0, [memoryview(block) for block in copies])
        for key in prompts:
            engine.admit(key, first[key].token)
        outputs, _, steps = run(engine, *prompts)
        assert [computed(step) for step in steps] == 7 * [dict.fromkeys(prompts, 1)], "all in one batch"
        for key, tokens in prompts.items():
            assert [first[key].token, *outputs[key]] == self.text(tokens, **asked[key])

    def test_log_probabilities_of_a_request_that_stays_are_those_of_one_that_moves(self, engine):
        tokens, sampling = prompt(40), {**DRAWN, "logprobs": 2, "max_tokens": 4}
        moved = adopt_all(engine, {"a": tokens}, **sampling), run(engine, "a")[0]["a"]
        first = stay(engine, "p", "d", tokens, **sampling)
        engine.admit("d", first.token)
        local = run(engine, "d")[0]["d"]
        assert [first.token, *token_ids(local)] == [moved[0]["a"], *token_ids(moved[1])]
        for one, other in zip(local, moved[1], strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
            assert one.top == pytest.approx(other.top, abs=1e-3)
        assert first.ids[0].top

    def test_output_of_an_earlier_attempt_counts_for_one_that_stays(self, engine):
        tokens = prompt(62)
        right = self.text(tokens)
        first = stay(engine, "p", "d", (*tokens, *right[:3]), output_from=62)
        engine.admit("d", first.token)
        assert [first.token, *run(engine, "d")[0]["d"]] == right[3:]

    def test_one_that_stayed_is_preempted_and_held_as_any_other(self, engine):
        """Three that fit in the beginning and not in the end, in steps without a chunk: only prompts wait for one."""
        prompts = {key: prompt(108, salt) for salt, key in enumerate("abc")}
        first = {key: stay(engine, f"p{key}", key, tokens, max_tokens=24) for key, tokens in prompts.items()}
        for key in prompts:
            with pytest.raises(EngineError, match="is not admitted"):
                engine.hold(key, True)
            engine.admit(key, first[key].token)
        start = engine.step()
        engine.hold("a", True)
        alone = engine.step(chunk=0)
        engine.hold("a", False)
        assert computed(start) == dict.fromkeys("abc", 1) and computed(alone) == dict.fromkeys("bc", 1)
        rest, _, steps = run(engine, *prompts, chunk=0)
        assert any(step.preempted for step in steps)
        assert {span.key for step in steps for span in step.spans} <= {*prompts}
        for key, tokens in prompts.items():
            early = [sampled.token for step in (start, alone) for sampled in step.tokens if sampled.key == key]
            assert [first[key].token, *early, *rest[key]] == self.text(tokens, max_tokens=24)

    def test_blocks_of_one_that_stays_are_reported_when_there_are_more(self, engine):
        for length, more in ((48, []), (160, [6])):
            engine.add(engine_request("p", "prefill", prompt(length), max_tokens=4))
            engine.stay("p", "d")
            steps = [engine.step() for _ in range(-(-length // 64))]
            *before, last = [dict(step.held) for step in steps]
            assert all({*each} <= {"p"} for each in before) and last == {}
            engine.admit("d", steps[-1].tokens[0].token)
            assert [count for step in run(engine, "d")[2] for _, count in step.held] == more
        self.expect_all_blocks(engine)

    @pytest.mark.parametrize("ends", ["length", "stop"])
    def test_one_whose_first_token_ends_it_does_not_stay(self, engine, ends):
        tokens = prompt(48)
        asked = {"max_tokens": 1} if ends == "length" else {"stop_token_ids": [self.text(tokens)[0]]}
        assert stay(engine, "p", "d", tokens, **asked).reason == ends
        for call in (lambda: engine.admit("d", 5), lambda: engine.stay("p", "d")):
            with pytest.raises(EngineError):
                call()
        self.expect_all_blocks(engine)

    def test_what_cannot_stay_is_refused_and_nothing_changes(self, engine):
        engine.add(engine_request("p", "prefill", prompt(40)))
        engine.add(engine_request("other", "prefill", prompt(40, 1)))
        engine.add(engine_request("group", "prefill", prompt(10), siblings=[("sibling", 1)]))
        engine.add(engine_request("decode", "decode", prompt(10)))
        engine.stay("p", "d")
        for key, decode_key in (
            ("never there", "x"),
            ("decode", "x"),
            ("group", "x"),
            ("p", "d"),
            ("p", "x"),
            ("other", "d"),
            ("other", "other"),
            ("other", "decode"),
        ):
            with pytest.raises(EngineError):
                engine.stay(key, decode_key)
        with pytest.raises(EngineError, match="already there"):
            engine.add(engine_request("d", "decode", prompt(10)))
        for key in ("other", "group", "decode"):
            engine.cancel(key)
        (first,) = engine.step().tokens
        engine.admit("d", first.token)
        assert [first.token, *run(engine, "d")[0]["d"]] == self.text(prompt(40))

    @pytest.mark.parametrize("state", ["new", "computing", "held", "waiting", "admitted", "running"])
    def test_cancelling_one_that_stays_gives_all_blocks_back(self, engine, state):
        engine.add(engine_request("p", "prefill", prompt(70)))
        engine.stay("p", "d")
        if state != "new":
            tokens = [engine.step() for _ in range(1 if state in ("computing", "held") else 2)][-1].tokens
        if state == "held":
            engine.hold("p", True)
        if state in ("admitted", "running"):
            engine.admit("d", tokens[0].token)
        if state == "running":
            engine.step()
        engine.cancel("p" if state in ("new", "computing", "held") else "d")
        assert engine.step() == StepDone()
        self.expect_all_blocks(engine)
        engine.add(engine_request("d", "prefill", prompt(10)))  # its key is free again
        engine.cancel("d")

    def test_a_decode_key_that_is_cancelled_early_takes_the_stay_back(self, engine):
        engine.add(engine_request("p", "prefill", prompt(70)))
        engine.stay("p", "d")
        engine.step()
        engine.cancel("d")
        assert [(each.key, each.reason) for each in engine.step().tokens] == [("p", None)]
        with pytest.raises(EngineError):
            engine.admit("d", 5)
        self.expect_all_blocks(engine)

    # ------------------------------------------------------------ a limited chunk

    def test_a_step_computes_no_more_prefill_tokens_than_it_may(self, engine):
        prompts = {"a": prompt(40), "b": prompt(24), "c": prompt(72)}
        for key, tokens in prompts.items():
            engine.add(engine_request(key, "prefill", tokens))
        steps = [engine.step(chunk=chunk) for chunk in (0, 10, 40, 0, 100)]
        assert [list(step.spans) for step in steps] == [
            [],
            [Span("a", 0, 10)],
            [Span("a", 10, 40), Span("b", 0, 10)],
            [],
            [Span("b", 10, 24), Span("c", 0, 50)],
        ]
        steps.append(engine.step())
        tokens = {sampled.key: sampled.token for step in steps for sampled in step.tokens}
        assert tokens == {key: self.text(made, max_tokens=1)[0] for key, made in prompts.items()}

    def test_decodes_run_whatever_the_chunk_is_and_those_that_join_leave_it_alone(self, engine):
        tokens = prompt(40)
        copies, first = prefill(engine, "p", tokens)
        outputs = {"a": [first.token], "b": [first.token], "long": []}
        engine.add(engine_request("long", "prefill", prompt(100)))
        found = []
        for number, chunk in enumerate((7, 5, 0, 0, 6, 100, 100)):
            if number < 4 and number % 2 == 0:
                engine.add(engine_request("ab"[number // 2], "decode", tokens))
            step = engine.step(chunk=chunk)
            found.append(computed(step))
            self.collect(step, outputs)
            for key in step.allocated:
                engine.adopt(key, 0, [memoryview(block) for block in copies])
                engine.admit(key, first.token)
        assert [step.get("long", 0) for step in found] == [7, 5, 0, 0, 6, 62, 20]
        assert [[step.get(key, 0) for key in "ab"] for step in found] == [[0, 0], [1, 0], [1, 0], *[[1, 1]] * 4]
        rest = run(engine, "a", "b", chunk=0)[0]
        assert all([*outputs[key], *rest[key]] == self.text(tokens) for key in "ab")
        assert outputs["long"] == self.text(prompt(100), max_tokens=1)
