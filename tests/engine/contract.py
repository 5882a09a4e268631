"""What every engine promises (tetri/engine/base.py), as tests that run on any: a class with an `engine` fixture that
makes a fresh one of `CAPACITY`, and a method `right(prompt, sampling)` that says which tokens must come out."""

from __future__ import annotations

import pytest

from tetri.engine.base import EngineError
from tetri.leg import Leg, Span, StepDone
from tetri.request import Capacity, Sampling, blocks_for

CAPACITY = Capacity(blocks=12, block_tokens=4, chunk_tokens=8, max_batch=4, context=32)


def prompt(length, salt=0):
    return tuple((7 * position + salt) % 50 + 3 for position in range(length))


def leg(key, phase, tokens, output_from=None, **sampling):
    sampling = Sampling(**{"max_tokens": 8, "ignore_eos": True, **sampling})
    return Leg(key, phase, tuple(tokens), len(tokens) if output_from is None else output_from, sampling)


def prefill(engine, key, tokens, **sampling):
    """Run a prefill leg alone: the copies of its blocks, taken as each chunk fills them, and its token."""
    engine.add(leg(key, "prefill", tokens, **sampling))
    copies, done = [], 0
    while done < len(tokens):
        step = engine.step()
        ((_, _, done),) = ((span.key, span.start, span.stop) for span in step.spans if span.key == key)
        last = done == len(tokens)
        stop = blocks_for(done, engine.capacity.block_tokens) if last else done // engine.capacity.block_tokens
        copies += export(engine, key, len(copies), stop)
    return copies, step.tokens[0]


def export(engine, key, start, stop):
    blocks = [bytearray(engine.fingerprint.block_bytes) for _ in range(stop - start)]
    engine.export(key, start, stop, [memoryview(block) for block in blocks])
    return blocks


def adopt(engine, key, tokens, copies, token, output_from=None, **sampling):
    """Bring a decode leg into the running batch."""
    engine.add(leg(key, "decode", tokens, output_from, **sampling))
    assert key in engine.step().allocated
    engine.adopt(key, 0, [memoryview(block) for block in copies])
    engine.admit(key, token)


def adopt_all(engine, prompts, **sampling):
    """Prefill prompts one by one, then bring all of them into the batch at once: their first tokens by key."""
    ready = {key: prefill(engine, f"p{key}", tokens, **sampling) for key, tokens in prompts.items()}
    for key, tokens in prompts.items():
        engine.add(leg(key, "decode", tokens, **sampling))
    assert engine.step().allocated == tuple(prompts)
    for key, (copies, first) in ready.items():
        engine.adopt(key, 0, [memoryview(block) for block in copies])
        engine.admit(key, first.token)
    return {key: first.token for key, (_, first) in ready.items()}


def held(step: StepDone):
    return dict(step.held)


def run(engine, *keys):
    """Step until these legs have ended: their tokens, the reasons of their ends, and all the steps."""
    tokens, reasons, steps = {key: [] for key in keys}, {}, []
    while len(reasons) < len(keys):
        step = engine.step()
        assert step.spans, "the engine does not go on"
        steps.append(step)
        for sampled in step.tokens:
            tokens[sampled.key].append(sampled.token)
            if sampled.reason:
                reasons[sampled.key] = sampled.reason
    return tokens, reasons, steps


class EngineContract:
    def right(self, tokens, sampling):
        raise NotImplementedError

    # ------------------------------------------------------------ prefill

    def test_prompts_are_cut_into_chunks_in_the_order_in_which_they_came(self, engine):
        engine.add(leg("a", "prefill", prompt(10)))
        engine.add(leg("b", "prefill", prompt(3)))
        engine.add(leg("c", "prefill", prompt(9)))
        steps = [engine.step() for _ in range(3)]
        assert [list(step.spans) for step in steps] == [
            [Span("a", 0, 8)],
            [Span("a", 8, 10), Span("b", 0, 3), Span("c", 0, 3)],
            [Span("c", 3, 9)],
        ]
        assert [[token.key for token in step.tokens] for step in steps] == [[], ["a", "b"], ["c"]]

    def test_a_prefill_leg_ends_with_its_token_and_its_blocks_stay_readable_until_the_next_step(self, engine):
        copies, sampled = prefill(engine, "a", prompt(6))
        assert sampled.token == self.right(prompt(6), Sampling(max_tokens=1, ignore_eos=True))[0]
        assert export(engine, "a", 0, 2) == copies
        assert not held(engine.step())

    def test_the_only_token_asked_for_ends_it_by_length(self, engine):
        assert prefill(engine, "a", prompt(6), max_tokens=1)[1].reason == "length"
        assert prefill(engine, "b", prompt(6), max_tokens=2)[1].reason is None

    def test_chunks_that_are_exported_early_hold_the_same_bytes(self, engine):
        early, _ = prefill(engine, "a", prompt(20))
        late = export(engine, "a", 0, 5)
        assert early == late

    def test_what_can_never_run_is_refused(self, engine):
        good = leg("a", "prefill", prompt(4))
        engine.add(good)
        for bad in (
            good,
            leg("b", "prefill", ()),
            leg("b", "prefill", prompt(32)),
            leg("b", "prefill", [10**9]),
            leg("b", "prefill", prompt(4), output_from=2, max_tokens=2),
        ):
            with pytest.raises(EngineError):
                engine.add(bad)

    # ------------------------------------------------------------ decode

    def test_a_hand_over_gives_the_tokens_of_one_engine_that_did_it_all(self, engine):
        for length in (1, 4, 7, 8, 9, 20):
            tokens = prompt(length, salt=length)
            copies, first = prefill(engine, f"p{length}", tokens)
            adopt(engine, f"d{length}", tokens, copies, first.token)
            outputs, reasons, steps = run(engine, f"d{length}")
            right = self.right(tokens, Sampling(max_tokens=8, ignore_eos=True))
            assert [first.token, *outputs[f"d{length}"]] == right and reasons == {f"d{length}": "length"}
            assert all(span.stop - span.start == 1 for step in steps for span in step.spans), "nothing again"

    def test_output_of_an_earlier_attempt_is_prefilled_and_counts(self, engine):
        tokens = prompt(6)
        right = self.right(tokens, Sampling(max_tokens=8, ignore_eos=True))
        engine.add(leg("p", "prefill", (*tokens, *right[:3]), output_from=6))
        engine.step()
        (sampled,) = engine.step().tokens
        copies = export(engine, "p", 0, 3)
        assert sampled.token == right[3]
        adopt(engine, "d", (*tokens, *right[:3]), copies, sampled.token, output_from=6)
        assert run(engine, "d")[0]["d"] == right[4:]

    def test_several_run_at_once_and_each_gets_its_own(self, engine):
        prompts = {"a": prompt(5), "b": prompt(9), "c": prompt(2)}
        first = adopt_all(engine, prompts, max_tokens=4)
        outputs, _, steps = run(engine, *prompts)
        for key, tokens in prompts.items():
            assert [first[key], *outputs[key]] == self.right(tokens, Sampling(max_tokens=4, ignore_eos=True))
        assert len(steps) == 3, "all in one batch"

    def test_one_swapped_block_or_flipped_byte_changes_the_tokens(self, engine):
        tokens = prompt(16)
        right = self.right(tokens, Sampling(max_tokens=8, ignore_eos=True))
        copies, first = prefill(engine, "p", tokens)
        flipped = [bytearray(block) for block in copies]
        flipped[1][0] ^= 1
        for key, wrong in (("s", [copies[1], copies[0], *copies[2:]]), ("f", flipped)):
            adopt(engine, key, tokens, wrong, first.token)
            assert run(engine, key)[0][key] != right[1:]

    # ------------------------------------------------------------ memory

    def test_blocks_are_reported_leg_by_leg_and_come_back(self, engine):
        copies, first = prefill(engine, "p", prompt(7))
        adopt(engine, "d", prompt(7), copies, first.token, max_tokens=4)
        _, _, steps = run(engine, "d")
        assert [held(step).get("d", 0) for step in steps] == [2, 3, 0]

    def test_memory_of_ended_legs_is_used_again_without_a_trace(self, engine):
        for number in range(10):  # more than the engine holds at once
            tokens = prompt(13, salt=number)
            copies, first = prefill(engine, f"p{number}", tokens)
            adopt(engine, f"d{number}", tokens, copies, first.token, max_tokens=4)
            right = self.right(tokens, Sampling(max_tokens=4, ignore_eos=True))
            assert run(engine, f"d{number}")[0][f"d{number}"] == right[1:]

    def test_a_decode_leg_waits_for_its_blocks(self, engine):
        engine.add(leg("a", "decode", prompt(30)))
        engine.add(leg("b", "decode", prompt(28)))
        assert engine.step().allocated == ("a",)
        assert not engine.step().allocated
        engine.cancel("a")
        assert engine.step().allocated == ("b",)

    @pytest.mark.parametrize("state", ["new", "computing", "computed", "parked", "allocated", "admitted", "running"])
    def test_cancelling_in_every_state_gives_all_blocks_back(self, engine, state):
        tokens = prompt(20)
        if state in ("new", "computing", "computed"):
            engine.add(leg("x", "prefill", tokens))
            for _ in range({"new": 0, "computing": 1, "computed": 3}[state]):
                engine.step()
        elif state in ("parked", "allocated"):
            engine.add(leg("x", "decode", tokens))
            if state == "allocated":
                engine.step()
        else:
            copies, first = prefill(engine, "p", tokens)
            adopt(engine, "x", tokens, copies, first.token)
            if state == "running":
                engine.step()
        engine.cancel("x")
        engine.cancel("x")
        engine.cancel("never there")
        engine.add(leg("all", "decode", prompt(31)))
        for number in range(4):  # 8 + 4 blocks: every block there is
            engine.add(leg(str(number), "decode", prompt(4)))
        assert engine.step().allocated == ("all", "0", "1", "2", "3")

    def test_an_idle_step_does_nothing(self, engine):
        assert engine.step() == StepDone()

    # ------------------------------------------------------------ preemption

    def crowd(self, engine):
        """Three that fit in the beginning and not in the end: 3 x 3 blocks of 12, 3 x 5 in the end."""
        prompts = {key: prompt(11, salt) for salt, key in enumerate("abc")}
        first = adopt_all(engine, prompts, max_tokens=9)
        return prompts, first, *run(engine, *prompts)

    def test_preempted_legs_get_the_right_tokens(self, engine):
        prompts, first, outputs, _, steps = self.crowd(engine)
        assert any(step.preempted for step in steps)
        for key, tokens in prompts.items():
            assert [first[key], *outputs[key]] == self.right(tokens, Sampling(max_tokens=9, ignore_eos=True))

    def test_preemption_shows_in_the_spans_and_in_what_is_held(self, engine):
        *_, steps = self.crowd(engine)
        lost = [(number, key) for number, step in enumerate(steps) for key in step.preempted]
        for number, key in lost:
            again = next(span for step in steps[number:] for span in step.spans if span.key == key)
            assert again.start == 0 and again.stop > 11, "all of it is computed again"
        assert all(sum(held(step).values()) <= CAPACITY.blocks for step in steps)
