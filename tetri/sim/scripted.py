"""A simulated engine that replays recorded texts: output lengths and hidden-state estimates are the recorded ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat

from tetri.cost import Cost
from tetri.engine.paged import Paged
from tetri.engine.plan import EOS, Slot, StepPlan
from tetri.engine_request import EngineRequest, HiddenStateEstimate, StepDone
from tetri.instance import Capacity
from tetri.request import LengthDistribution, Sampling
from tetri.sim.texts import RecordedText

TextOf = Callable[[Sampling], RecordedText | None]
NEVER = 1 << 62


@dataclass(slots=True, eq=False)
class Script:
    """An engine request and its recorded text. `due`: the number of known output tokens after the pass that computes
    the hidden state of `text.follows[place]`."""

    text: RecordedText
    slot: Slot
    place: int = 0
    due: int = NEVER

    def move_to(self, outputs: int) -> None:
        """Move to the first state that is computed with this many known output tokens or more."""
        follows = self.text.follows
        while self.place < len(follows) and follows[self.place][0] < outputs:
            self.place += 1
        self.due = follows[self.place][0] + 1 if self.place < len(follows) else NEVER

    def passed(self, outputs: int) -> tuple[int, LengthDistribution]:
        """Return the last state that was computed before this many output tokens were known, and move past it."""
        self.move_to(outputs)
        return self.text.follows[self.place - 1]


class Scripted(Paged):
    """The engine. `text_of(sampling)` returns the recorded text of a request, None if it writes tokens until its limit.
    With `estimates_lengths`, a step reports the recorded estimates of the hidden states that it computes: at the end of
    a prefill, and in a decode the last one of the step. This includes engine requests that end in the step."""

    def __init__(self, capacity: Capacity, cost: Cost, text_of: TextOf, *, estimates_lengths: bool) -> None:
        super().__init__(capacity, cost)
        self.text_of, self.estimates_lengths = text_of, estimates_lengths
        self._scripts: dict[str, Script] = {}

    def add(self, request: EngineRequest) -> None:
        super().add(request)
        text = self.text_of(request.sampling)
        if text is None:
            return
        slot = self.slots[request.key]
        slot.end = min(slot.end, request.output_from + text.output)
        script = self._scripts[request.key] = Script(text, slot)
        if self.estimates_lengths:
            outputs = len(request.tokens) - request.output_from
            script.move_to(outputs + (request.phase == "decode"))  # a decode request is admitted with one more

    def cancel(self, key: str) -> None:
        super().cancel(key)
        self._scripts.pop(key, None)

    def _turn(self, slot: Slot) -> None:
        prefill = self._scripts.get(slot.key)
        if prefill is not None:
            prefill.slot = replace(slot)  # as it is now: its state is reported by that, then `run` drops this script
        super()._turn(slot)
        if prefill is not None:
            script = self._scripts[slot.key] = Script(prefill.text, slot)
            if self.estimates_lengths:
                script.move_to(slot.known - slot.request.output_from + 1)

    def run(self, plan: StepPlan, steps: int) -> StepDone:
        """Carry out the first `steps` passes of the plan and return their result."""
        done = self.finish(plan, steps, self._ids)
        if not self._scripts:
            return done
        estimates = tuple(self._estimated(done)) if self.estimates_lengths else ()
        for sampled in done.tokens:
            if sampled.key not in self.slots:
                self._scripts.pop(sampled.key, None)
        return done.changed(estimates=estimates) if estimates else done

    def _ids(self, slots: Sequence[Slot], count: int) -> Iterable[tuple[int, ...]]:
        """Return ids of which none ends a request, except for texts that stop by themselves. Siblings write the text of
        the first choice."""
        same = (1,) * count
        if not self._scripts:
            return repeat(same, len(slots))
        if slots[0].request.phase == "prefill":
            return [(EOS,) * count if self._stops(slot, 1) else same for slot in slots]
        return [(*same[1:], EOS) if self._stops(slot, count) else same for slot in slots]

    def _stops(self, slot: Slot, count: int) -> bool:
        script = self._scripts.get(slot.key)
        return script is not None and slot.known + count >= slot.end and script.text.reason == "stop"

    def _estimated(self, done: StepDone) -> Iterator[HiddenStateEstimate]:
        for sampled in done.tokens:
            script = self._scripts.get(sampled.key)
            if script is None:
                continue
            outputs = script.slot.known - script.slot.request.output_from
            if outputs >= script.due:
                known, distribution = script.passed(outputs)
                yield HiddenStateEstimate(key=sampled.key, outputs=known, distribution=distribution)
