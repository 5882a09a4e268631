"""A classifier that serves: beside the main model, in a thread of its own, or in front of it (paper, section 3.3.1:
parallel and sequential mode).

In parallel mode prompts are read in batches of what waits. Nobody waits for the thread: `ask` returns at once, what
comes too late comes too late, and of more prompts than it can read the oldest go without. The thread is one core's at
most, and shares the GIL with the main model only between two operators.

Whatever goes wrong inside a classifier ends the classifier, not the worker: it is logged once, from then on every
question is answered with nothing, and `trouble` says why.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from tetri import log
from tetri.request import LengthDistribution

BATCH = 16  # prompts that are read together
QUEUE = 64  # prompts that wait to be read; of more the oldest go without
NICE = 5  # of the thread, above the worker's own: who computes the prompts goes first
SILENT_S = 10.0  # a batch under way for so long: the predictor hangs
LEAVE_S = 2.0  # at the end, for the batch under way

THREAD = "predictor"

NONE = LengthDistribution(0, ())  # odds that are none

Answer = tuple[str, LengthDistribution | None]


class Classifier(Protocol):
    """The part of tetri.predict.model.Loaded that is used here."""

    def read(self, texts: Sequence[str]) -> tuple[list[LengthDistribution], list[int]]:
        """One batch, of longer texts the ends; and how many tokens each text has."""


class EstimatorHead(Protocol):
    """The part of tetri.predict.model.Loaded, of kind hidden, that is used here."""

    @property
    def layer(self) -> int: ...

    @property
    def every(self) -> int: ...

    def estimate(self, states: Any, outputs: Sequence[int]) -> list[LengthDistribution]: ...


class Reading:
    """A classifier that cannot fail. `text`: from a prompt's ids to its text; `most`: tokens of a text that are read at
    most; 0: all. `cut` counts the prompts of which only the ends were read."""

    def __init__(
        self, classifier: Classifier, text: Callable[[Sequence[int]], str], most: int, logger: logging.Logger
    ) -> None:
        self._classifier, self._text, self._most, self._log = classifier, text, most, logger
        self.trouble = ""
        self.cut = 0

    def prepare(self, *steps: Callable[[], None]) -> None:
        """What is to be done first, in the thread that reads; a failure there is one of the classifier."""
        try:
            for step in steps:
                step()
        except Exception as error:  # as below
            self.trouble = _failed("classifier", error, self._log)

    def distribution(self, prompts: Sequence[Sequence[int]]) -> list[LengthDistribution | None]:
        """One each; None when there is no telling, for good from the first failure on."""
        if self.trouble:
            return [None] * len(prompts)
        try:
            found, tokens = self._classifier.read([self._text(prompt) for prompt in prompts])
            if len(found) != len(prompts):
                raise ValueError(f"{len(found)} answers to {len(prompts)} prompts")
        except Exception as error:  # of any kind: a broken predictor must not take the main model with it
            self.trouble = _failed("classifier", error, self._log)
            return [None] * len(prompts)
        self.cut += sum(count > self._most for count in tokens) if self._most else 0
        return list(found)


class Steady:
    """A head that reads hidden states (tetri.predict.model.Loaded, of kind hidden), and cannot fail once it has
    answered: its first answer is asked for at the start, when an error still helps."""

    def __init__(self, head: EstimatorHead, logger: logging.Logger) -> None:
        self._head, self._log = head, logger
        self.layer, self.every = head.layer, head.every
        self._answered = False
        self.trouble = ""

    def estimate(self, states: Any, outputs: Sequence[int]) -> list[LengthDistribution]:
        """Odds that are none from the first failure on; whoever uses them sees that."""
        if not self.trouble:
            try:
                found = self._head.estimate(states, outputs)
            except Exception as error:  # as above
                if not self._answered:
                    raise
                self.trouble = _failed("hidden-state head", error, self._log)
            else:
                self._answered = True
                return found
        return [NONE] * len(outputs)


def _failed(what: str, error: Exception, logger: logging.Logger) -> str:
    """Logs it, and says it in one line."""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{os.path.basename(last.filename)}:{last.lineno}"
    logger.error("the %s is off from now on %s", what, log.fields(why=reason, kind=type(error).__name__, at=where))
    return f"the {what} failed: {reason}"


class Sequential:
    """In front of the main model: the answer comes at once, and everything waits for it."""

    unread = 0

    def __init__(self, reading: Reading) -> None:
        self._reading = reading

    def ask(self, key: str, prompt: Sequence[int]) -> Answer | None:
        (distribution,) = self._reading.distribution([prompt])
        return key, distribution

    def answers(self) -> Iterator[Answer]:
        return iter(())

    @property
    def trouble(self) -> str:
        return self._reading.trouble

    @property
    def cut(self) -> int:
        return self._reading.cut

    def close(self) -> None: ...


class Parallel:
    """Beside the main model. `wake` is called from the thread when `answers` has something. `alone`: prompts of more
    tokens than this are read by themselves, since the others of a batch would be as long as they; 0: none is, for all
    are cut to the same length. `begin` is called in the thread first. `unread` counts the prompts that it never came
    to."""

    def __init__(
        self,
        reading: Reading,
        wake: Callable[[], None],
        alone: int = 0,
        clock: Callable[[], float] = time.monotonic,
        begin: Callable[[], None] = lambda: None,
        nice: int = NICE,
    ) -> None:
        self._reading, self._wake, self._alone, self._clock = reading, wake, alone, clock
        self._begin, self._nice = begin, nice
        self._waiting: deque[tuple[str, Sequence[int]]] = deque()
        self._answers: deque[Answer] = deque()
        self._changed = threading.Condition()
        self._since: float | None = None  # when the batch under way was begun
        self._closing = False
        self.unread = 0
        # A daemon: when the thread hangs, the process can end all the same.
        self._thread = threading.Thread(target=self._work, name=THREAD, daemon=True)
        self._thread.start()

    def ask(self, key: str, prompt: Sequence[int]) -> Answer | None:
        """Comes back with `answers`, perhaps much later; at once, with nothing, while the predictor is in trouble."""
        if self.trouble:
            return key, None
        with self._changed:
            oldest = self._waiting.popleft() if len(self._waiting) >= QUEUE else None
            self._waiting.append((key, prompt))
            self._changed.notify()
        if oldest is None:
            return None
        self.unread += 1
        return oldest[0], None

    def answers(self) -> Iterator[Answer]:
        """What has come since it was asked last."""
        while self._answers:
            yield self._answers.popleft()

    @property
    def trouble(self) -> str:
        """Why nothing is predicted at present; empty: it is."""
        since = self._since
        if since is not None and (silent := self._clock() - since) > SILENT_S:
            return f"the classifier has not answered for {silent:.0f} s"
        return self._reading.trouble

    @property
    def cut(self) -> int:
        return self._reading.cut

    def close(self) -> None:
        """End the thread; one that hangs is left behind. A second call does nothing."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(LEAVE_S)

    # ------------------------------------------------------------ in the thread

    def _work(self) -> None:
        self._reading.prepare(lambda: lower_priority(self._nice), self._begin)
        while batch := self._next():
            distribution = self._reading.distribution([prompt for _, prompt in batch])
            self._since = None
            self._answers.extend((key, each) for (key, _), each in zip(batch, distribution, strict=True))
            if not self._closing:
                self._wake()

    def _next(self) -> list[tuple[str, Sequence[int]]]:
        """What waits, as far as it is read together; nothing: the end."""
        with self._changed:
            while not (self._waiting or self._closing):
                self._changed.wait()
            if self._closing:
                return []
            batch = [self._waiting.popleft()]
            while self._waiting and len(batch) < BATCH and not (self._long(batch[0]) or self._long(self._waiting[0])):
                batch.append(self._waiting.popleft())
            self._since = self._clock()
            return batch

    def _long(self, waiting: tuple[str, Sequence[int]]) -> bool:
        return bool(self._alone) and len(waiting[1]) > self._alone


def still_reading() -> bool:
    """Whether the thread of a `Parallel` that was closed goes on with its last batch. Python must not end under it: the
    process would be aborted."""
    return any(thread.name == THREAD for thread in threading.enumerate())


def lower_priority(nice: int) -> None:
    """Of the calling thread alone, which Linux can and others cannot: there all stays as it is."""
    if os.uname().sysname == "Linux":
        me = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, me, os.getpriority(os.PRIO_PROCESS, me) + nice)


def one_core() -> None:
    """Operators of the calling thread compute in it alone."""
    import torch

    torch.set_num_threads(1)
