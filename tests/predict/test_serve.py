"""A classifier beside the main model and in front of it: batches, floods, and one that fails or hangs."""

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from live import wait_until

from tetri.predict import serve
from tetri.predict.serve import Parallel, Reading, Sequential, Steady, still_reading
from tetri.request import LengthDistribution

LOG = logging.getLogger("tetri.test")


class LengthWait:
    """A classifier to which the length of a text is all: its odds are a bucket of that width. `go` is when it may read
    the next batch; `batches` are those that it began to read."""

    def __init__(self, fails_at: str = "", may_read: int = 0) -> None:
        self.go = threading.Semaphore(may_read)
        self.batches: list[list[str]] = []
        self.fails_at, self.priority = fails_at, 0

    def read(self, texts: Sequence[str]) -> tuple[list[LengthDistribution], list[int]]:
        self.priority = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        self.batches.append(list(texts))
        assert self.go.acquire(timeout=20)
        if self.fails_at in texts and self.fails_at:
            raise RuntimeError(f"no idea\nof {self.fails_at}")
        return [LengthDistribution(len(text), (1.0,)) for text in texts], [len(text) for text in texts]


class Clock:
    now = 5.0

    def __call__(self) -> float:
        return self.now


def words(prompt: Sequence[int]) -> str:
    return bytes(prompt).decode()


def reading(classifier: Any) -> Reading:
    return Reading(classifier, words, 8, LOG)


@pytest.fixture
def parallel() -> Iterator[Callable[..., tuple[Parallel, LengthWait]]]:
    """Begins to read `first` beside, and holds it up."""
    made: list[tuple[Parallel, LengthWait]] = []

    def make(first: str, fails_at: str = "", **options: Any) -> tuple[Parallel, LengthWait]:
        classifier = LengthWait(fails_at)
        beside = Parallel(reading(classifier), options.pop("wake", lambda: None), **options)
        made.append((beside, classifier))
        assert beside.ask(first, first.encode()) is None
        wait_until(lambda: len(classifier.batches) == 1, "it does not begin")
        return beside, classifier

    yield make
    for beside, classifier in made:
        classifier.go.release(1000)
        beside.close()
        beside.close()
        assert not still_reading()


def heard(beside: Parallel, count: int) -> list[tuple[str, LengthDistribution | None]]:
    answers: list[tuple[str, LengthDistribution | None]] = []

    def enough() -> bool:
        answers.extend(beside.answers())
        return len(answers) >= count

    wait_until(enough, "not all questions are answered")
    return answers


def test_in_front_the_answer_comes_at_once() -> None:
    before = Sequential(reading(LengthWait(may_read=2)))
    assert before.ask("k", b"abc") == ("k", LengthDistribution(3, (1.0,)))
    assert before.ask("l", b"abcdefghi") == ("l", LengthDistribution(9, (1.0,)))
    assert ([*before.answers()], before.trouble, before.cut, before.unread) == ([], "", 1, 0)
    before.close()


def test_in_front_a_failure_ends_it() -> None:
    before = Sequential(reading(SimpleNamespace(read=lambda texts: ([], []))))
    assert before.ask("k", b"a") == ("k", None) and before.trouble == "the classifier failed: 0 answers to 1 prompts"


def test_beside_nobody_waits_and_what_waits_is_read_together(parallel: Any) -> None:
    woken = threading.Event()
    beside, classifier = parallel("first", wake=woken.set)
    assert not woken.is_set() and [*beside.answers()] == []
    for number in range(1, 20):
        assert beside.ask(f"k{number}", b"x" * number) is None
    classifier.go.release(3)
    expected = [("first" if n == 0 else f"k{n}", LengthDistribution(n or 5, (1.0,))) for n in range(20)]
    assert heard(beside, 20) == expected and woken.is_set()
    assert [len(batch) for batch in classifier.batches] == [1, serve.BATCH, 3]
    assert (beside.cut, beside.unread) == (11, 0)


def test_the_thread_lets_others_go_first_on_linux(parallel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    began = threading.get_native_id()
    before = os.getpriority(os.PRIO_PROCESS, began)
    begun = threading.Event()
    _, classifier = parallel("a", begin=begun.set)
    assert classifier.priority == min(19, before + serve.NICE) and begun.is_set()
    assert os.getpriority(os.PRIO_PROCESS, began) == before, "only its own"
    monkeypatch.setattr(os, "uname", lambda: type("U", (), {"sysname": "Darwin"}))
    serve.lower_priority(3)
    assert os.getpriority(os.PRIO_PROCESS, began) == before


def test_long_prompts_are_read_alone_where_nothing_cuts_them(parallel: Any) -> None:
    beside, classifier = parallel("now", alone=4)
    for text in ("a", "b", "longer", "longest", "c", "d"):
        beside.ask(text, text.encode())
    classifier.go.release(9)
    heard(beside, 7)
    assert classifier.batches == [["now"], ["a", "b"], ["longer"], ["longest"], ["c", "d"]]


def test_in_a_flood_the_oldest_go_without(parallel: Any) -> None:
    beside, classifier = parallel("under way")
    assert [beside.ask(f"k{n}", b"a") for n in range(serve.QUEUE)] == [None] * serve.QUEUE
    assert [beside.ask(f"l{n}", b"a") for n in range(3)] == [(f"k{n}", None) for n in range(3)]
    classifier.go.release(99)
    keys = [key for key, distribution in heard(beside, serve.QUEUE + 1) if distribution is not None]
    assert keys == ["under way", *(f"k{n}" for n in range(3, serve.QUEUE)), *(f"l{n}" for n in range(3))]
    assert beside.unread == 3


def test_a_failure_is_logged_once_and_nobody_gets_an_answer(parallel: Any, caplog: pytest.LogCaptureFixture) -> None:
    beside, classifier = parallel("bad", fails_at="bad")
    beside.ask("l", b"good")
    classifier.go.release(9)
    assert heard(beside, 2) == [("bad", None), ("l", None)]
    assert beside.trouble == "the classifier failed: no idea of bad"
    assert beside.ask("m", b"good") == ("m", None)
    assert classifier.batches == [["bad"]]
    (record,) = caplog.records
    assert record.message.startswith("the classifier is off from now on why=no idea of bad kind=RuntimeError at=test")


def test_a_thread_that_cannot_begin_is_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    def begin() -> None:
        raise OSError("no right to do so")

    beside = Parallel(reading(LengthWait()), lambda: None, begin=begin)
    try:
        wait_until(lambda: beside.trouble != "", "it is not noticed")
        assert beside.trouble == "the classifier failed: no right to do so"
        assert beside.ask("a", b"prompt") == ("a", None)
    finally:
        beside.close()
    assert not still_reading()


def test_a_thread_that_hangs_is_left_behind_and_the_process_can_tell(parallel: Any, monkeypatch: Any) -> None:
    """Its worker ends without waiting for it: proc/test_live_predictor.py has one that never answers."""
    monkeypatch.setattr(serve, "LEAVE_S", 0.01)
    beside, classifier = parallel("k")
    beside.close()
    assert still_reading()
    classifier.go.release()
    wait_until(lambda: not still_reading(), "it does not end")


def test_one_that_hangs_is_not_asked_until_it_answers(parallel: Any) -> None:
    clock = Clock()
    beside, classifier = parallel("k", clock=clock)
    clock.now += serve.SILENT_S
    assert beside.trouble == "" and beside.ask("l", b"b") is None
    clock.now += 5
    assert beside.trouble == "the classifier has not answered for 15 s"
    assert beside.ask("m", b"c") == ("m", None)
    classifier.go.release(2)
    assert [key for key, _ in heard(beside, 2)] == ["k", "l"]
    wait_until(lambda: beside.trouble == "", "it is still in trouble")
    assert beside.ask("n", b"d") is None


class Head:
    layer, every = 16, 64

    def __init__(self, *results: Any) -> None:
        self.results = list(results)

    def estimate(self, states: Any, outputs: Sequence[int]) -> list[LengthDistribution]:
        result = self.results.pop(0)
        if isinstance(result, Exception):
            raise result
        return [result] * len(outputs)


def test_a_head_may_fail_at_its_first_answer_only(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="other size"):
        Steady(Head(ValueError("of another\nother size")), LOG).estimate(None, [0])
    distribution = LengthDistribution(100, (1.0,))
    head = Steady(Head(distribution, ValueError("NaN"), distribution), LOG)
    assert (head.layer, head.every) == (16, 64)
    assert head.estimate(None, [0]) == [distribution] and head.trouble == ""
    assert head.estimate(None, [0, 0]) == [serve.NONE, serve.NONE]
    assert head.trouble == "the hidden-state head failed: NaN"
    assert head.estimate(None, [0]) == [serve.NONE] and len(caplog.records) == 1
