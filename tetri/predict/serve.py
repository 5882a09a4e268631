"""Runs a classifier in a worker: in a thread beside the main model (parallel mode), or before each prefill (sequential
mode); paper, section 3.3.1.

In parallel mode the thread reads the waiting prompts in batches. `ask` returns at once and nothing waits for the
thread. When more prompts wait than the thread can read, the oldest get no prediction. The thread uses one core at most,
and needs the GIL only between two torch operators.

An error inside a classifier does not stop the worker. It is logged once; then every prediction is None, and `trouble`
has the reason.
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

BATCH = 16  # prompts per batch
QUEUE = 64  # waiting prompts; when there are more, the oldest get no prediction
NICE = 5  # niceness of the thread above the worker's: the main model has priority
SILENT_S = 10.0  # a batch that takes longer counts as hung
LEAVE_S = 2.0  # how long `close` waits for the current batch

THREAD = "predictor"

NONE = LengthDistribution(0, ())  # stands for: no prediction

Answer = tuple[str, LengthDistribution | None]


class Classifier(Protocol):
    """The part of tetri.predict.model.Loaded that is used here."""

    def read(self, texts: Sequence[str]) -> tuple[list[LengthDistribution], list[int]]:
        """(distribution of each text, token count of each text), computed as one batch. Longer texts are cut."""


class EstimatorHead(Protocol):
    """The part of tetri.predict.model.Loaded, of kind hidden, that is used here."""

    @property
    def layer(self) -> int:
        """Number of layers after which the hidden state is read."""

    @property
    def every(self) -> int:
        """Output tokens between two reads of the hidden state."""

    def estimate(self, states: Any, outputs: Sequence[int]) -> list[LengthDistribution]:
        """Distributions of the remaining tokens, for `states` [n, hidden] and the known output tokens of each. Raises
        PredictError when the states have another size."""


class Reading:
    """Runs a classifier and catches its errors.

    `text` decodes a prompt's token ids. `most` is the number of tokens that the classifier reads of a text (0: all),
    and `cut` counts the prompts that had more."""

    def __init__(
        self, classifier: Classifier, text: Callable[[Sequence[int]], str], most: int, logger: logging.Logger
    ) -> None:
        self._classifier, self._text, self._most, self._log = classifier, text, most, logger
        self.trouble = ""
        self.cut = 0

    def prepare(self, *steps: Callable[[], None]) -> None:
        """Run `steps` in the calling thread, the one that will read. An error counts as an error of the classifier."""
        try:
            for step in steps:
                step()
        except Exception as error:  # as in `distribution`
            self.trouble = _failed("classifier", error, self._log)

    def distribution(self, prompts: Sequence[Sequence[int]]) -> list[LengthDistribution | None]:
        """One prediction per prompt; all are None from the first error on."""
        if self.trouble:
            return [None] * len(prompts)
        try:
            found, tokens = self._classifier.read([self._text(prompt) for prompt in prompts])
            if len(found) != len(prompts):
                raise ValueError(f"{len(found)} answers to {len(prompts)} prompts")
        except Exception as error:  # any error: a broken predictor must not stop the worker
            self.trouble = _failed("classifier", error, self._log)
            return [None] * len(prompts)
        self.cut += sum(count > self._most for count in tokens) if self._most else 0
        return list(found)


class Steady:
    """Runs a head on hidden states (tetri.predict.model.Loaded of kind hidden) and catches its errors after the first
    success. The worker calls it once at start, where an error is raised and stops the start."""

    def __init__(self, head: EstimatorHead, logger: logging.Logger) -> None:
        self._head, self._log = head, logger
        self.layer, self.every = head.layer, head.every
        self._answered = False
        self.trouble = ""

    def estimate(self, states: Any, outputs: Sequence[int]) -> list[LengthDistribution]:
        """One prediction per state; all are NONE from the first error on. Raises any error of the first call."""
        if not self.trouble:
            try:
                found = self._head.estimate(states, outputs)
            except Exception as error:  # as in Reading.distribution
                if not self._answered:
                    raise
                self.trouble = _failed("hidden-state head", error, self._log)
            else:
                self._answered = True
                return found
        return [NONE] * len(outputs)


def _failed(what: str, error: Exception, logger: logging.Logger) -> str:
    """Log the error. Returns one line for the status."""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{os.path.basename(last.filename)}:{last.lineno}"
    logger.error("the %s is off from now on %s", what, log.fields(why=reason, kind=type(error).__name__, at=where))
    return f"the {what} failed: {reason}"


class Sequential:
    """Sequential mode: `ask` computes the prediction, and the main model waits."""

    unread = 0

    def __init__(self, reading: Reading) -> None:
        self._reading = reading

    def ask(self, key: str, prompt: Sequence[int]) -> Answer | None:
        """Predict now."""
        (distribution,) = self._reading.distribution([prompt])
        return key, distribution

    def answers(self) -> Iterator[Answer]:
        """Always empty: `ask` returns each answer itself."""
        return iter(())

    @property
    def trouble(self) -> str:
        """Why there are no predictions; "" if there are."""
        return self._reading.trouble

    @property
    def cut(self) -> int:
        """Prompts that were too long to be read completely."""
        return self._reading.cut

    def close(self) -> None:
        """Nothing to end."""


class Parallel:
    """Parallel mode: a thread predicts beside the main model.

    wake    called from the thread when `answers` has something
    alone   prompts with more tokens get a batch of their own, because a batch is padded to its longest prompt; 0: no
            prompt does, for a classifier that cuts all prompts to one length
    begin   called first in the thread
    nice    niceness of the thread above the worker's
    unread  counts the prompts that were dropped from the queue
    """

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
        self._since: float | None = None  # start of the current batch
        self._closing = False
        self.unread = 0
        # A daemon thread, so that a hung thread does not keep the process alive.
        self._thread = threading.Thread(target=self._work, name=THREAD, daemon=True)
        self._thread.start()

    def ask(self, key: str, prompt: Sequence[int]) -> Answer | None:
        """Queue a prompt; `answers` yields its prediction later.

        Returns an answer without a prediction at once for a prompt that is not read: for this prompt while there is
        `trouble`, for the oldest prompt when the queue is full."""
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
        """Yield the answers since the last call."""
        while self._answers:
            yield self._answers.popleft()

    @property
    def trouble(self) -> str:
        """Why there are no predictions at present; "" if there are."""
        since = self._since
        if since is not None and (silent := self._clock() - since) > SILENT_S:
            return f"the classifier has not answered for {silent:.0f} s"
        return self._reading.trouble

    @property
    def cut(self) -> int:
        """Prompts that were too long to be read completely."""
        return self._reading.cut

    def close(self) -> None:
        """End the thread; leave it behind after LEAVE_S if it hangs. A second call does nothing."""
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
        """Wait for the next batch. [] means: end the thread."""
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
    """Whether the thread of a closed `Parallel` still runs. The process must then end without finalising Python, which
    would abort."""
    return any(thread.name == THREAD for thread in threading.enumerate())


def lower_priority(nice: int) -> None:
    """Raise the niceness of the calling thread by `nice`. Does nothing outside Linux: there, threads have none."""
    if os.uname().sysname == "Linux":
        me = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, me, os.getpriority(os.PRIO_PROCESS, me) + nice)


def one_core() -> None:
    """Make torch operators of the calling thread use one core."""
    import torch

    torch.set_num_threads(1)
