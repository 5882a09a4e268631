"""With tetri's scheduler vLLM keeps the contract of an engine: small blocks and chunks, in float32, on the tokens of a
vLLM alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from vllm_process import BLOCK_BYTES, EngineProcess, arguments

from tests.engine.contract import CAPACITY, EngineContract
from tests.engine.driving import adopt_all, computed, engine_request, prompt, run
from tests.engine.move_contract import MoveContract
from tetri.engine_request import StepDone
from tetri.kv.base import Block, parts
from tetri.request import Sampling

pytestmark = [pytest.mark.model, pytest.mark.timeout(400)]


class Near:
    """An engine in another process, called as if it were here."""

    def __init__(self, process: EngineProcess) -> None:
        self.process = process
        self.fingerprint, self.capacity, *_ = process.facts()
        for name in ("add", "cancel", "admit", "hold", "stay"):
            setattr(self, name, getattr(process, name))

    def step(self, most: int = 1, chunk: int | None = None) -> StepDone:
        return self.process.step(most, chunk)

    def export(self, key: str, start: int, stop: int, into: Sequence[memoryview]) -> None:
        for place, block in zip(into, self.process.export(key, start, stop), strict=True):
            place[:] = block

    def adopt(self, key: str, start: int, blocks: Sequence[Block]) -> None:
        self.process.adopt(key, start, [tuple(map(bytes, parts(block))) for block in blocks])


@pytest.fixture(scope="module")
def small(model) -> Iterator[EngineProcess]:
    fields = {
        **arguments(model, "float32", 20, max_batch=CAPACITY.max_batch),
        "block_tokens": CAPACITY.block_tokens,
        "chunk_tokens": CAPACITY.chunk_tokens,
        "context": CAPACITY.context,
        "kv_bytes": (CAPACITY.blocks + 1) * BLOCK_BYTES["float32"] * CAPACITY.block_tokens // 128,
    }
    made = EngineProcess("tetri", **fields)
    yield made
    made.close()


@pytest.fixture(scope="module")
def texts() -> dict:
    return {}


class TestContract(EngineContract, MoveContract):
    @pytest.fixture
    def engine(self, small) -> Iterator[Near]:
        made = Near(small)
        assert made.capacity == CAPACITY
        yield made
        assert small.step() is not None
        assert (small.free_blocks(), small.engine_requests()) == (CAPACITY.blocks, 0), "a test leaves nothing behind"

    @pytest.fixture(autouse=True)
    def alone(self, reference, texts) -> None:
        self.reference, self.texts = reference, texts

    def right(self, tokens, sampling):
        name = tokens, repr(sampling)
        if name not in self.texts:
            self.texts[name] = self.reference.generate(list(tokens), sampling).ids
        return self.texts[name]

    def test_who_comes_back_needs_several_steps_and_a_prompt_takes_what_is_left_of_them(self, engine):
        """When a has ended, beside b."""
        prompts = {"b": prompt(88), "a": prompt(108, salt=1), "c": prompt(108, salt=2)}
        first = adopt_all(engine, {"b": prompts["b"]}, max_tokens=40)
        first |= adopt_all(engine, {key: prompts[key] for key in "ac"}, max_tokens=24)
        steps = []
        while not steps or computed(steps[-1]).get("c") != 63:
            steps.append(engine.step())
        engine.add(engine_request("p", "prefill", prompt(60)))
        steps += [engine.step(), engine.step()]
        assert [computed(step) for step in steps[-3:]] == [
            {"b": 1, "c": 63},
            {"b": 1, "c": 63},
            {"b": 1, "c": 3, "p": 60},
        ]
        engine.cancel("b")
        outputs = run(engine, "c")[0]["c"]
        told = [token for step in steps for sampled in step.tokens if sampled.key == "c" for token in sampled.ids]
        assert [first["c"], *told, *outputs] == self.right(prompts["c"], Sampling(max_tokens=24, ignore_eos=True))
