"""What every engine promises of a decode request that goes on in another engine while it runs: tests as in contract.py.
Here one engine is both, which it cannot know."""

from __future__ import annotations

import pytest

from tests.engine.contract import CAPACITY
from tests.engine.driving import adopt, engine_request, export, prefill, prompt, run
from tetri.engine.base import EngineError
from tetri.request import Sampling, blocks_for, token_ids

BLOCK = CAPACITY.block_tokens


class MoveContract:
    @pytest.mark.parametrize(("length", "before", "after"), [(30, 1, 1), (33, 2, 0), (60, 3, 36), (10, 0, 25)])
    def test_a_running_request_goes_on_under_another_key_with_the_same_tokens(self, engine, length, before, after):
        """Full blocks are copied while it runs, the rest once it is held."""
        tokens = prompt(length, salt=length)
        copies, first = prefill(engine, "p", tokens, max_tokens=60)
        adopt(engine, "a", tokens, copies, first.token, max_tokens=60)
        output = [first.token]
        self.steps(engine, before, output)
        known = [*tokens, *output[:-1]]
        engine.add(engine_request("b", "decode", known, length, ahead=50, max_tokens=60))
        assert self.steps(engine, 1, output).allocated == ("b",)
        early = export(engine, "a", 0, len(known) // BLOCK)
        engine.adopt("b", 0, [memoryview(block) for block in early])
        self.steps(engine, after, output)
        engine.hold("a", True)
        assert not engine.step().tokens
        late = export(engine, "a", len(early), blocks_for(length + len(output) - 1, BLOCK))
        engine.adopt("b", len(early), [memoryview(block) for block in late])
        fresh = output[len(known) - length :]
        engine.admit("b", fresh[0], fresh[1:])
        engine.cancel("a")
        outputs, reasons, steps = run(engine, "b")
        assert [*output, *outputs["b"]] == self.right(tokens, Sampling(max_tokens=60, ignore_eos=True))
        assert reasons == {"b": "length"} and not any(step.spans for step in steps), "nothing is computed again"

    @staticmethod
    def steps(engine, count, output):
        for _ in range(count):
            step = engine.step()
            output += [token for sampled in step.tokens for token in token_ids(sampled.ids)]
        return step if count else None

    def test_one_that_was_held_goes_on_where_it_is_if_nobody_takes_it(self, engine):
        tokens, output = prompt(40), []
        copies, first = prefill(engine, "p", tokens, max_tokens=20)
        adopt(engine, "a", tokens, copies, first.token, max_tokens=20)
        self.steps(engine, 3, output)
        engine.hold("a", True)
        export(engine, "a", 0, 2)
        engine.hold("a", False)
        outputs, _, steps = run(engine, "a")
        assert [first.token, *output, *outputs["a"]] == self.right(tokens, Sampling(max_tokens=20, ignore_eos=True))
        assert not any(step.spans for step in steps)

    def test_it_reserves_blocks_for_all_its_room_and_no_more_tokens_may_come(self, engine):
        tokens = prompt(60)
        copies, first = prefill(engine, "p", tokens, max_tokens=60)
        with pytest.raises(EngineError, match="too much"):
            engine.add(engine_request("b", "decode", tokens, 60, ahead=60, max_tokens=60))
        engine.add(engine_request("b", "decode", tokens, 60, ahead=6, max_tokens=60))
        step = engine.step()
        assert step.allocated == ("b",) and dict(step.held)["b"] == 3
        engine.adopt("b", 0, [memoryview(block) for block in copies])
        with pytest.raises(EngineError, match="room for 6 tokens, not 7"):
            engine.admit("b", first.token, (1,) * 7)
        engine.admit("b", first.token)
        outputs, _, _ = run(engine, "b")
        assert [first.token, *outputs["b"]] == self.right(tokens, Sampling(max_tokens=60, ignore_eos=True))
