"""Runs scenes on an engine, through its contract only, and times each step.

A step is identified by what ran in it, not by what was requested. All scenes run in turn, several times, so that a
disturbance of some seconds affects one time of many points, not all times of one point. A point's time is the lower
quartile of its times (the second best of five), because other load on a machine makes steps slower, hardly ever faster.
The median is not robust enough: if a fifth of all steps is disturbed, so is one in thirty medians of seven.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from statistics import median

from tetri.engine.base import Engine, EngineRequest, Phase, Span, StepDone
from tetri.profile.scenes import STEPS, Scene
from tetri.request import Sampling, blocks_for

WARM_EVERY = 8  # every eighth scene runs once as warm-up
MOST_IDLE = 8  # passes until an engine must have allocated all decode requests
TOKEN = 11  # valid in every vocabulary; token ids do not influence times


class ProfileError(ValueError):
    """An engine cannot be measured. The message is one line and says why."""


@dataclass(frozen=True, slots=True)
class What:
    """What ran in one step. `chunk`: span [start, stop) of each prompt; `batch`: number of decode requests; `context`:
    tokens of all their contexts, including those of the step."""

    chunk: tuple[tuple[int, int], ...] = ()
    batch: int = 0
    context: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of the chunk."""
        return sum(stop - start for start, stop in self.chunk)

    @property
    def pairs(self) -> int:
        """Tokens of each span times the tokens before it, summed: the load of the chunk."""
        return sum((stop - start) * start for start, stop in self.chunk)

    @property
    def spans(self) -> list[Span]:
        """The chunk as Spans, for the cost table."""
        return [Span(str(index), start, stop) for index, (start, stop) in enumerate(self.chunk)]


@dataclass(frozen=True, slots=True)
class MeasuredPoint:
    """One kind of step with its time. `seconds`: lower quartile over `times` steps. `spread`: median absolute deviation
    of the times, divided by their median. `held_out`: for testing only, not for the fit."""

    what: What
    seconds: float
    spread: float
    times: int
    held_out: bool


def measure(
    engine: Engine,
    scenes: Sequence[Scene],
    rounds: int,
    clock: Callable[[], float],
    rng: Random,
    progress: Callable[[int, int], None] = lambda done, total: None,
    enough: Callable[[bool], bool] = lambda complete: False,
) -> list[MeasuredPoint]:
    """Run all scenes `rounds` times, in a new random order each round. `clock`: seconds, from any start.
    `progress(done, total)` is called after each scene. `enough(complete)`, asked before each scene: whether to stop;
    `complete`: all have run once, else that is an error. Raises ProfileError or EngineError, with nothing left in the
    engine."""
    bench = _Bench(engine, clock)
    for scene in scenes[::WARM_EVERY]:  # a real engine loads and selects kernels in its first steps
        bench.run(scene)
    found: dict[What, list[float]] = {}
    fitted: set[What] = set()
    order = [scene for _ in range(rounds) for scene in rng.sample(scenes, len(scenes))]
    for index, scene in enumerate(order, 1):
        if enough(index > len(scenes)):
            if index <= len(scenes):
                raise ProfileError(f"the time was enough for {index - 1} of {len(scenes)} scenes only")
            break
        for what, seconds in bench.run(scene):
            found.setdefault(what, []).append(seconds)
            if not scene.held_out:
                fitted.add(what)
        progress(index, len(order))
    return [_point(what, times, what not in fitted) for what, times in found.items()]


def _point(what: What, times: list[float], held_out: bool) -> MeasuredPoint:
    middle = median(times)
    spread = median(abs(time - middle) for time in times) / middle if middle else 0.0
    return MeasuredPoint(what, sorted(times)[(len(times) - 1) // 4], spread, len(times), held_out)


class _Bench:
    def __init__(self, engine: Engine, clock: Callable[[], float]) -> None:
        self.engine, self.clock = engine, clock
        self.zeros = memoryview(bytes(engine.fingerprint.block_bytes))
        self.count = 0
        self.open: list[str] = []  # keys of the requests in the engine
        self.contexts: dict[str, int] = {}  # tokens that a decode request has computed

    def run(self, scene: Scene) -> list[tuple[What, float]]:
        """Run one scene and cancel its requests; returns what ran in each measured step, and its seconds."""
        try:
            return self._run(scene)
        finally:
            while self.open:
                self.engine.cancel(self.open.pop())

    def _run(self, scene: Scene) -> list[tuple[What, float]]:
        decodes = self._admitted(scene.contexts)
        if decodes:  # not measured: the first step after an admission does extra work
            self._step(len(decodes))
        for length in scene.prompts:
            self._add("prefill", length, 1)
        steps: list[tuple[What, float]] = []
        left = sum(scene.prompts)
        while left > 0 or (not scene.prompts and len(steps) < STEPS):
            what, seconds = self._step(len(decodes), left > 0)
            left -= what.tokens
            steps.append((what, seconds))
        return steps

    def _step(self, batch: int, prefills: bool = False) -> tuple[What, float]:
        begin = self.clock()
        done = self.engine.step()
        seconds = self.clock() - begin
        decodes = [sampled.key for sampled in done.tokens if sampled.key in self.contexts]
        for key in decodes:
            self.contexts[key] += 1
        if done.preempted or len(decodes) != batch or bool(done.spans) != prefills:
            raise ProfileError(_surprise(done, batch))
        parts = tuple(sorted((span.start, span.stop) for span in done.spans))
        return What(parts, batch, sum(self.contexts[key] for key in decodes)), seconds

    def _admitted(self, contexts: Sequence[int]) -> list[str]:
        """Add decode requests, with zeros as their KV, that run from the next step on; returns their keys."""
        keys = [self._add("decode", length, length_left(self.engine, length)) for length in contexts]
        allocated: set[str] = set()
        for _ in range(MOST_IDLE):
            if len(allocated) == len(keys):
                break
            allocated.update(self.engine.step().allocated)
        if len(allocated) < len(keys):
            raise ProfileError(f"the engine gave blocks to {len(allocated)} of {len(keys)} requests, and no more")
        for key, length in zip(keys, contexts, strict=True):
            self.engine.adopt(key, 0, [self.zeros] * blocks_for(length, self.engine.capacity.block_tokens))
            self.engine.admit(key, TOKEN)
        self.contexts = dict(zip(keys, contexts, strict=True))
        return keys

    def _add(self, phase: Phase, length: int, more: int) -> str:
        self.count += 1
        key = f"{phase}-{self.count}"
        sampling = Sampling(max_tokens=more, ignore_eos=True)
        self.engine.add(EngineRequest(key, phase, (TOKEN,) * length, length, sampling))
        self.open.append(key)
        return key


def length_left(engine: Engine, length: int) -> int:
    """A limit of output tokens so large that the request does not end while it is measured."""
    return min(engine.capacity.context - length, 1 << 20)


def _surprise(done: StepDone, batch: int) -> str:
    chunk = [f"{span.key} [{span.start}, {span.stop})" for span in done.spans]
    ran = ", ".join([*chunk, *(sampled.key for sampled in done.tokens)]) or "nothing"
    again = f"; preempted: {', '.join(done.preempted)}" if done.preempted else ""
    return f"a step that should have decoded {batch} requests ran {ran}{again}"
