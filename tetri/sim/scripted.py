"""An engine whose requests write recorded texts: they end where these end, and hidden states say what is recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from tetri.cost import Cost
from tetri.engine.paged import Paged
from tetri.engine.plan import EOS, Slot, StepPlan
from tetri.engine_request import EngineRequest, HiddenStateEstimate, StepDone
from tetri.request import Capacity, LengthDistribution, Sampling
from tetri.sim.texts import RecordedText

TextOf = Callable[[Sampling], RecordedText | None]
NEVER = 1 << 62


@dataclass(slots=True, eq=False)
class Script:
    """A leg and the text of its request. `due`: so many output tokens are known after the pass in which the state at
    `text.follows[place]` is computed."""

    text: RecordedText
    slot: Slot
    place: int = 0
    due: int = NEVER

    def move_to(self, outputs: int) -> None:
        """To the first state that is computed when so many tokens are known, or later."""
        follows = self.text.follows
        while self.place < len(follows) and follows[self.place][0] < outputs:
            self.place += 1
        self.due = follows[self.place][0] + 1 if self.place < len(follows) else NEVER

    def passed(self, outputs: int) -> tuple[int, LengthDistribution]:
        """The last state that was computed to get so many tokens."""
        self.move_to(outputs)
        return self.text.follows[self.place - 1]


class Scripted(Paged):
    """`text_of` names the text to which a request's sampling leads, as prompt and seed lead a model to one; None for a
    request that writes tokens until its limit. With `foretells`, what is recorded of a text's hidden states is told
    with the step that computes them, also of a leg that ends in it: at the end of a prefill leg, and of a decode leg
    the last one of the step."""

    def __init__(self, capacity: Capacity, cost: Cost, text_of: TextOf, *, estimates_lengths: bool) -> None:
        super().__init__(capacity, cost)
        self.text_of, self.estimates_lengths = text_of, estimates_lengths
        self._scripts: dict[str, Script] = {}
        self._ones: dict[int, tuple[int, ...]] = {}

    def add(self, request: EngineRequest) -> None:
        super().add(request)
        text = self.text_of(request.sampling)
        if text is None:
            return
        slot = self.slots[request.key]
        slot.end = min(slot.end, request.output_from + text.output)
        script = self._scripts[request.key] = Script(text, slot)
        if self.estimates_lengths:
            script.move_to(
                len(request.tokens) - request.output_from + (request.phase == "decode")
            )  # admitted with one more

    def cancel(self, key: str) -> None:
        super().cancel(key)
        self._scripts.pop(key, None)

    def run(self, plan: StepPlan, steps: int) -> StepDone:
        """The first `steps` passes of the plan are done."""
        done = self.finish(plan, steps, self._ids)
        if not self._scripts:
            return done
        estimates = tuple(self._estimated(done)) if self.estimates_lengths else ()
        for sampled in done.tokens:
            if sampled.key not in self.slots:
                self._scripts.pop(sampled.key, None)
        return replace(done, estimates=estimates) if estimates else done

    def _ids(self, key: str, count: int) -> tuple[int, ...]:
        script = self._scripts.get(key)
        if script is not None and script.slot.known >= script.slot.end and script.text.reason == "stop":
            return (*self._same(count - 1), EOS)
        return self._same(count)

    def _same(self, count: int) -> tuple[int, ...]:
        """Token ids that never end a request."""
        ids = self._ones.get(count)
        if ids is None:
            ids = self._ones[count] = (1,) * count
        return ids

    def _estimated(self, done: StepDone) -> Iterator[HiddenStateEstimate]:
        for sampled in done.tokens:
            script = self._scripts.get(sampled.key)
            if script is None:
                continue
            outputs = script.slot.known - script.slot.request.output_from
            if outputs >= script.due:
                known, distribution = script.passed(outputs)
                yield HiddenStateEstimate(key=sampled.key, outputs=known, distribution=distribution)
