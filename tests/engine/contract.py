"""What every engine promises (tetri/engine/base.py), as tests that run on any: a class with an `engine` fixture that
makes a fresh one of `CAPACITY`, and a method `right(prompt, sampling)` that says which tokens must come out.

Lengths are in tokens: a block holds 32, a step computes 64."""

from __future__ import annotations

import pytest

from tests.engine.driving import adopt, adopt_all, computed, engine_request, export, held, prefill, prompt, run
from tests.engine.stay_contract import StayContract
from tetri.engine.base import EngineError
from tetri.engine_request import Span, StepDone
from tetri.instance import Capacity
from tetri.request import Sampling, blocks_for

CAPACITY = Capacity(blocks=12, block_tokens=32, chunk_tokens=64, max_batch=4, context=256)
STEPS = {"new": 0, "computing": 1, "held": 1, "computed": 3}  # of a prefill of 160 tokens, until it is so


class EngineContract(StayContract):
    def right(self, tokens, sampling):
        raise NotImplementedError

    # ------------------------------------------------------------ prefill

    def test_prompts_are_cut_into_chunks_in_the_order_in_which_they_came(self, engine):
        engine.add(engine_request("a", "prefill", prompt(80)))
        engine.add(engine_request("b", "prefill", prompt(24)))
        engine.add(engine_request("c", "prefill", prompt(72)))
        steps = [engine.step() for _ in range(3)]
        assert [list(step.spans) for step in steps] == [
            [Span("a", 0, 64)],
            [Span("a", 64, 80), Span("b", 0, 24), Span("c", 0, 24)],
            [Span("c", 24, 72)],
        ]
        assert [[token.key for token in step.tokens] for step in steps] == [[], ["a", "b"], ["c"]]

    def test_a_prefill_leg_ends_with_its_token_and_its_blocks_stay_readable_until_the_next_step(self, engine):
        copies, sampled = prefill(engine, "a", prompt(48))
        assert sampled.token == self.right(prompt(48), Sampling(max_tokens=1, ignore_eos=True))[0]
        assert export(engine, "a", 0, 2) == copies
        assert engine.step() == StepDone()

    def test_the_only_token_asked_for_ends_it_by_length(self, engine):
        assert prefill(engine, "a", prompt(48), max_tokens=1)[1].reason == "length"
        assert prefill(engine, "b", prompt(48), max_tokens=2)[1].reason is None

    def test_chunks_that_are_exported_early_hold_the_same_bytes(self, engine):
        early, _ = prefill(engine, "a", prompt(160))
        late = export(engine, "a", 0, 5)
        assert early == late

    def test_what_can_never_run_is_refused(self, engine):
        good = engine_request("a", "prefill", prompt(32))
        engine.add(good)
        for bad in (
            good,
            engine_request("b", "prefill", ()),
            engine_request("b", "prefill", prompt(256)),
            engine_request("b", "prefill", [10**9]),
            engine_request("b", "prefill", prompt(32), output_from=30, max_tokens=2),
        ):
            with pytest.raises(EngineError):
                engine.add(bad)
        engine.add(engine_request("the longest", "prefill", prompt(255), max_tokens=1))
        engine.cancel("a")
        engine.cancel("the longest")

    # ------------------------------------------------------------ decode

    def test_a_hand_over_gives_the_tokens_of_one_engine_that_did_it_all(self, engine):
        for length in (1, 31, 32, 33, 64, 65, 160):
            tokens = prompt(length, salt=length)
            copies, first = prefill(engine, "p", tokens)
            adopt(engine, "d", tokens, copies, first.token)
            outputs, reasons, steps = run(engine, "d")
            right = self.right(tokens, Sampling(max_tokens=8, ignore_eos=True))
            assert [first.token, *outputs["d"]] == right and reasons == {"d": "length"}
            assert all(count == 1 for step in steps for count in computed(step).values()), "nothing again"

    def test_output_of_an_earlier_attempt_is_prefilled_and_counts(self, engine):
        tokens = prompt(62)
        right = self.right(tokens, Sampling(max_tokens=8, ignore_eos=True))
        engine.add(engine_request("p", "prefill", (*tokens, *right[:3]), output_from=62))
        engine.step()
        (sampled,) = engine.step().tokens
        copies = export(engine, "p", 0, 3)
        assert sampled.token == right[3]
        adopt(engine, "d", (*tokens, *right[:3]), copies, sampled.token, output_from=62)
        assert run(engine, "d")[0]["d"] == right[4:]

    def test_several_run_at_once_and_each_gets_its_own(self, engine):
        prompts = {"a": prompt(40), "b": prompt(72), "c": prompt(16)}
        first = adopt_all(engine, prompts, max_tokens=4)
        outputs, _, steps = run(engine, *prompts)
        for key, tokens in prompts.items():
            assert [first[key], *outputs[key]] == self.right(tokens, Sampling(max_tokens=4, ignore_eos=True))
        assert len(steps) == 3, "all in one batch"

    # ------------------------------------------------------------ several passes in one go

    def test_however_many_passes_a_step_may_make_the_tokens_are_the_same(self, engine):
        prompts = {"a": prompt(40), "b": prompt(72), "c": prompt(16)}
        right = {key: self.right(made, Sampling(max_tokens=8, ignore_eos=True)) for key, made in prompts.items()}
        for most in (1, 2, 3, 100):
            first = adopt_all(engine, prompts)
            outputs, _, steps = run(engine, *prompts, most=most)
            assert {key: [first[key], *outputs[key]] for key in prompts} == right
            for step in steps:
                assert step.steps <= most and set(computed(step).values()) == {step.steps}
                assert all(len(sampled.ids) == step.steps for sampled in step.tokens)

    # ------------------------------------------------------------ both phases at once

    def test_decodes_come_first_and_no_prefill_delays_them(self, engine):
        tokens = prompt(40)
        copies, first = prefill(engine, "p", tokens)
        engine.add(engine_request("long", "prefill", prompt(200)))
        assert computed(engine.step()) == {"long": 64}
        for key in "ab":
            engine.add(engine_request(key, "decode", tokens))
        step = engine.step()
        assert step.allocated == ("a", "b") and computed(step) == {"long": 64}, "blocks beside a full chunk"
        for key in "ab":
            engine.adopt(key, 0, [memoryview(block) for block in copies])
            engine.admit(key, first.token)
        steps = [engine.step(most=3) for _ in range(3)]
        assert [computed(step) for step in steps] == [
            {"a": 1, "b": 1, "long": 62},
            {"a": 1, "b": 1, "long": 10},
            dict.fromkeys("ab", steps[2].steps),
        ]
        assert [step.steps for step in steps[:2]] == [1, 1]
        outputs = run(engine, "a", "b")[0]
        for key in "ab":
            mine = [token for step in steps for sampled in step.tokens if sampled.key == key for token in sampled.ids]
            assert [first.token, *mine, *outputs[key]] == self.right(tokens, Sampling(max_tokens=8, ignore_eos=True))

    def test_a_mixed_step_changes_no_tokens(self, engine):
        """Prompts of every length go through beside running decodes, which in turn take what they computed."""
        waiting = [prompt(length, salt=length) for length in (5, 100, 33, 64, 90)]
        right = [self.right(tokens, Sampling(max_tokens=8, ignore_eos=True)) for tokens in waiting]
        outputs, copies, mixed = {}, {}, 0
        for number, tokens in enumerate(waiting):
            engine.add(engine_request(f"p{number}", "prefill", tokens))
            while f"p{number}" not in outputs:
                step = engine.step()
                mixed += len({sampled.key[0] for sampled in step.tokens} | {span.key[0] for span in step.spans}) == 2
                self.collect(step, outputs)
            copies[number] = export(engine, f"p{number}", 0, blocks_for(len(tokens), 32))
            (first,) = outputs[f"p{number}"]
            engine.add(engine_request(f"d{number}", "decode", tokens))
            self.collect(engine.step(), outputs)
            engine.adopt(f"d{number}", 0, [memoryview(block) for block in copies[number]])
            engine.admit(f"d{number}", first)
        while any(len(outputs.get(f"d{number}", ())) < 7 for number in range(5)):
            self.collect(engine.step(), outputs)
        assert [[*outputs[f"p{number}"], *outputs[f"d{number}"]] for number in range(5)] == right and mixed > 3

    def collect(self, step, outputs):
        for sampled in step.tokens:
            outputs.setdefault(sampled.key, []).extend(sampled.ids)

    def test_a_held_leg_computes_nothing_and_keeps_its_blocks_and_its_place(self, engine):
        tokens = prompt(150)
        engine.add(engine_request("a", "prefill", tokens))
        engine.add(engine_request("b", "prefill", prompt(100, salt=1)))
        first = engine.step()
        early = export(engine, "a", 0, 2)
        engine.hold("a", True)
        engine.hold("a", True)
        steps = [engine.step() for _ in range(2)]
        assert [computed(step) for step in steps] == [{"b": 64}, {"b": 36}]
        assert engine.step() == StepDone(), "nothing but a held leg is there"
        assert held([first, *steps], "a")[-1] >= 2 and export(engine, "a", 0, 2) == early
        engine.add(engine_request("c", "prefill", prompt(10)))
        engine.hold("a", False)
        assert [computed(engine.step()) for _ in range(1)] == [{"a": 64}], "it is older than c"
        step = engine.step()
        assert computed(step) == {"a": 22, "c": 10}
        assert step.tokens[0].token == self.right(tokens, Sampling(max_tokens=1, ignore_eos=True))[0]

    def test_a_leg_can_be_held_before_its_first_chunk(self, engine):
        for key in "ab":
            engine.add(engine_request(key, "prefill", prompt(40)))
        engine.hold("a", True)
        engine.hold("never there", True)
        assert computed(engine.step()) == {"b": 40}
        engine.hold("a", False)
        assert computed(engine.step()) == {"a": 40}

    def test_a_decode_leg_can_be_held_once_it_is_admitted(self, engine):
        tokens = prompt(10)
        copies, first = prefill(engine, "p", tokens)
        engine.add(engine_request("d", "decode", tokens))
        for _ in range(2):
            with pytest.raises(EngineError, match="is not admitted"):
                engine.hold("d", True)
            engine.step()
        engine.adopt("d", 0, [memoryview(block) for block in copies])
        engine.admit("d", first.token)
        engine.hold("d", True)
        assert engine.step().tokens == (), "it has not run yet"
        engine.hold("d", False)
        assert computed(engine.step()) == {"d": 1}
        engine.hold("d", True)
        assert engine.step().tokens == ()
        engine.cancel("d")

    def test_one_decode_can_run_alone_while_the_batch_is_held(self, engine):
        prompts = {"a": prompt(40), "b": prompt(72), "c": prompt(16)}
        first = adopt_all(engine, prompts)
        outputs = {key: [first[key]] for key in prompts}
        for held_keys in ((), "ab", "abc", "b", ()):
            for key in prompts:
                engine.hold(key, key in held_keys)
            step = engine.step()
            assert computed(step) == {key: 1 for key in prompts if key not in held_keys}
            self.collect(step, outputs)
        engine.add(engine_request("long", "prefill", prompt(70)))
        for key in prompts:
            engine.hold(key, True)
        assert [computed(engine.step()) for _ in range(2)] == [{"long": 64}, {"long": 6}]
        for key in prompts:
            engine.hold(key, False)
        rest = run(engine, *prompts)[0]
        for key, tokens in prompts.items():
            right = self.right(tokens, Sampling(max_tokens=8, ignore_eos=True))
            assert [*outputs[key], *rest[key]] == right

    # ------------------------------------------------------------ memory

    def test_blocks_are_reported_leg_by_leg_and_come_back(self, engine):
        copies, first = prefill(engine, "p", prompt(63))
        engine.add(engine_request("d", "decode", prompt(63), max_tokens=4))
        allocated = engine.step()
        engine.adopt("d", 0, [memoryview(block) for block in copies])
        engine.admit("d", first.token)
        _, _, steps = run(engine, "d")
        assert held([allocated, *steps], "d")[:3] == [2, 2, 3]
        self.expect_all_blocks(engine)

    def test_memory_of_ended_legs_is_used_again_without_a_trace(self, engine):
        for number in range(10):  # more than the engine holds at once
            tokens = prompt(100, salt=number)
            copies, first = prefill(engine, f"p{number}", tokens)
            adopt(engine, f"d{number}", tokens, copies, first.token, max_tokens=4)
            right = self.right(tokens, Sampling(max_tokens=4, ignore_eos=True))
            assert run(engine, f"d{number}")[0][f"d{number}"] == right[1:]

    def test_a_decode_leg_waits_for_its_blocks(self, engine):
        engine.add(engine_request("a", "decode", prompt(240)))
        engine.add(engine_request("b", "decode", prompt(220)))
        assert engine.step().allocated == ("a",)
        assert not engine.step().allocated
        engine.cancel("a")
        assert engine.step().allocated == ("b",)
        engine.cancel("b")

    def test_kv_that_comes_for_a_leg_that_does_not_wait_for_it_is_refused(self, engine):
        """A copy may be on its way while its leg ends, or goes on."""
        copies, first = prefill(engine, "p", prompt(63))
        blocks = [memoryview(block) for block in copies]
        engine.add(engine_request("ended", "decode", prompt(63)))
        engine.step()
        engine.cancel("ended")
        engine.add(engine_request("new", "decode", prompt(63)))
        for key in ("never there", "ended", "new"):
            with pytest.raises(EngineError):
                engine.adopt(key, 0, blocks)
        engine.step()
        with pytest.raises(EngineError):
            engine.adopt("new", 1, blocks)
        engine.adopt("new", 0, blocks)
        engine.admit("new", first.token)
        with pytest.raises(EngineError):
            engine.adopt("new", 0, blocks)
        right = self.right(prompt(63), Sampling(max_tokens=8, ignore_eos=True))
        assert run(engine, "new")[0]["new"] == right[1:]

    @pytest.mark.parametrize(
        "state", ["new", "computing", "held", "computed", "parked", "allocated", "admitted", "running"]
    )
    def test_cancelling_in_every_state_gives_all_blocks_back(self, engine, state):
        tokens = prompt(160)
        if state in STEPS:
            engine.add(engine_request("x", "prefill", tokens))
            for _ in range(STEPS[state]):
                engine.step()
            if state == "held":
                engine.hold("x", True)
                engine.step()
        elif state in ("parked", "allocated"):
            engine.add(engine_request("x", "decode", tokens))
            if state == "allocated":
                engine.step()
        else:
            adopt_all(engine, {"x": tokens})
            if state == "running":
                engine.step()
        engine.cancel("x")
        engine.cancel("x")
        engine.cancel("never there")
        self.expect_all_blocks(engine)

    def expect_all_blocks(self, engine):
        """Nobody is here: 8 + 4 blocks, every block there is, can be had at once."""
        keys = ("all", "0", "1", "2", "3")
        for key in keys:
            engine.add(engine_request(key, "decode", prompt(248 if key == "all" else 24)))
        assert engine.step().allocated == keys
        for key in keys:
            engine.cancel(key)

    def test_an_idle_step_does_nothing(self, engine):
        assert engine.step() == engine.step(most=7) == StepDone()

    # ------------------------------------------------------------ preemption

    def crowd(self, engine, most=1):
        """Three that fit in the beginning and not in the end: 3 x 4 blocks of 12, 3 x 5 in the end."""
        prompts = {key: prompt(108, salt) for salt, key in enumerate("abc")}
        first = adopt_all(engine, prompts, max_tokens=24)
        return prompts, first, *run(engine, *prompts, most=most)

    def test_preempted_legs_get_the_right_tokens(self, engine):
        for most in (1, 5):
            prompts, first, outputs, _, steps = self.crowd(engine, most)
            assert any(step.preempted for step in steps)
            for key, tokens in prompts.items():
                assert [first[key], *outputs[key]] == self.right(tokens, Sampling(max_tokens=24, ignore_eos=True))

    def test_preemption_shows_in_the_spans_and_in_what_is_held(self, engine):
        *_, steps = self.crowd(engine)
        lost = [(number, key) for number, step in enumerate(steps) for key in step.preempted]
        assert lost
        for number, key in lost:
            again = [span for step in steps[number:] for span in step.spans if span.key == key]
            assert again[0].start == 0 and sum(span.stop - span.start for span in again) > 128, "all of it again"
            assert held(steps[: number + 1], key)[-1] == 0
        assert all(sum(counts) <= CAPACITY.blocks for counts in zip(*(held(steps, key) for key in "abc"), strict=True))

    def test_a_prefill_under_way_is_never_preempted(self, engine):
        """Two decodes grow from 2 x 2 blocks to 2 x 5 while a prompt of 7 blocks stands half way, then goes on."""
        prompts = {key: prompt(60, salt) for salt, key in enumerate("ab")}
        outputs = {key: [token] for key, token in adopt_all(engine, prompts, max_tokens=80).items()}
        engine.add(engine_request("long", "prefill", prompt(200)))
        steps = []
        while len(outputs["a"]) < 80 or len(outputs["b"]) < 80 or "long" not in outputs:
            steps.append(engine.step())
            self.collect(steps[-1], outputs)
            engine.hold("long", 1 <= len(steps) <= 60)
        spans = [span for step in steps for span in step.spans if span.key == "long"]
        assert [span.start for span in spans] == [0, *[span.stop for span in spans[:-1]]] and spans[-1].stop == 200
        assert {key for step in steps for key in step.preempted} == {"b"}
        outputs["long"] = outputs["long"][:1]
        for key, tokens in {**prompts, "long": prompt(200)}.items():
            sampling = Sampling(max_tokens=len(outputs[key]), ignore_eos=True)
            assert outputs[key] == self.right(tokens, sampling)
