"""One vLLM engine that computes prompts and runs decodes in the same steps, against vLLM alone, token by token."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from handover import BLOCK, engine_request
from vllm_process import EngineProcess

from tetri.engine.base import StepDone
from tetri.request import Sampling, blocks_for

pytestmark = [pytest.mark.model, pytest.mark.timeout(400)]

TEXT = Sampling(max_tokens=16, ignore_eos=True)
UNDER_WAY = 2  # prefill legs at a time
GAP = 1e-3  # below it, rounding alone may decide between two tokens: chunk boundaries change the last bits


@dataclass
class Mixed:
    """Prompts go in one after another; each, as soon as its first token is known, decodes in the same engine. Every
    few steps the oldest prefill leg is held for a while. `steps`: positions of (decodes, prefills) of each."""

    engine: EngineProcess
    prompts: list[list[int]]
    next: int = 0
    prefilling: list[int] = field(default_factory=list)
    moving: dict[int, list[bytearray]] = field(default_factory=dict)
    running: set[int] = field(default_factory=set)
    ids: dict[int, list[int]] = field(default_factory=dict)
    steps: list[tuple[int, int]] = field(default_factory=list)
    held: tuple[int, int] | None = None  # whom, and until which step

    def run(self) -> None:
        while self.next < len(self.prompts) or self.prefilling or self.moving or self.running:
            self.fill()
            self.hold()
            expected = {f"d{number}" for number in self.running}
            done = self.engine.step()
            assert {span.key for span in done.spans if span.key[0] == "d"} == expected, "every decode, every step"
            self.take(done)

    def fill(self) -> None:
        while self.next < len(self.prompts) and len(self.prefilling) < UNDER_WAY:
            self.engine.add(engine_request(f"p{self.next}", "prefill", self.prompts[self.next], TEXT))
            self.prefilling.append(self.next)
            self.next += 1

    def hold(self) -> None:
        if self.held and len(self.steps) >= self.held[1]:
            self.engine.hold(f"p{self.held[0]}", False)
            self.held = None
        if not self.held and self.prefilling and len(self.steps) % 7 == 3:
            self.held = self.prefilling[0], len(self.steps) + 2
            self.engine.hold(f"p{self.held[0]}", True)

    def take(self, done: StepDone) -> None:
        spans = {span.key: span.stop - span.start for span in done.spans}
        decodes = sum(count for key, count in spans.items() if key[0] == "d")
        self.steps.append((decodes, sum(spans.values()) - decodes))
        assert sum(spans.values()) <= 512 and not done.preempted
        assert not (self.held and f"p{self.held[0]}" in spans)
        for token in done.tokens:
            number = int(token.key[1:])
            self.ids.setdefault(number, []).append(token.token)
            if token.key[0] == "p":
                self.prefilling.remove(number)
                blocks = blocks_for(len(self.prompts[number]), BLOCK)
                self.moving[number] = self.engine.export(token.key, 0, blocks)
                self.engine.add(engine_request(f"d{number}", "decode", self.prompts[number], TEXT))
            elif token.reason:
                self.running.remove(number)
        for key in done.allocated:
            number = int(key[1:])
            self.engine.adopt(key, 0, self.moving.pop(number))
            self.engine.admit(key, self.ids[number][0])
            self.running.add(number)


def test_mixed_steps_change_no_token(float32, engine, prompts):
    chosen = prompts[::2]
    mixed = Mixed(engine, chosen)
    mixed.run()
    assert len(chosen) == 20 and sum(bool(decodes and prefills) for decodes, prefills in mixed.steps) > 12
    full = [decodes + prefills for decodes, prefills in mixed.steps if prefills]
    assert full.count(512) > 3, "decodes and prefills share the budget"
    equal = 0
    for number, tokens in enumerate(chosen):
        text = float32.reference.text(tokens, TEXT.max_tokens)
        equal += mixed.ids[number] == text.ids
        if mixed.ids[number] != text.ids:
            at = next(i for i, (a, b) in enumerate(zip(mixed.ids[number], text.ids, strict=True)) if a != b)
            assert text.gaps[at] < GAP, f"prompt {number}, token {at}"
    assert equal >= 19
