"""The queue of texts: whose turn it is, what does not fit, and a tokenising process that dies."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event

import pytest
from live import wait_until
from played_tokenizer import command, pid, tokenised

from tetri.proc.texts import Texts, Tokenised
from tetri.text import TextError
from tetri.wire.clients import Submit

Start = Callable[..., "Queue"]
PATIENCE_S = 60.0


class Queue(Texts):
    """As the broker's thread uses it. Its texts are their own keys."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.woken, self.folder = Event(), folder
        super().__init__(command(folder), self.woken.set, most_bytes, logging.getLogger("test"))

    def put(self, text: str, client: bytes = b"a") -> bool:
        return self.add(client, Submit(key=text, secret="s" * 22, prompt=text), b"digest", 0.0)

    def wait(self, count: int) -> list[Tokenised]:
        found: list[Tokenised] = []
        while len(found) < count:
            assert self.woken.wait(PATIENCE_S)
            self.woken.clear()
            found += self.done()
        return found

    def answers(self, count: int) -> dict[str, str]:
        """By text, what became of it: itself, or the problem."""
        found = {each.waiting.message.key: each.problem or bytes(list(each.ids)).decode() for each in self.wait(count)}
        assert len(found) == count
        return found

    def keep_busy(self) -> None:
        """With a text that waits."""
        assert self.put("wait")
        wait_until(lambda: tokenised(self.folder) == ["wait"], "it does not begin")

    def go(self) -> None:
        """Let the process go on with a text that waits."""
        (self.folder / "go").write_bytes(b"")


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Start]:
    started: list[Queue] = []

    def made(most_bytes: int = 1 << 20) -> Queue:
        os.mkfifo(tmp_path / "go")
        started.append(Queue(tmp_path, most_bytes))
        started[0].start()
        started[0].ready()
        return started[0]

    yield made
    started[0].close()


def test_each_text_becomes_what_it_is_or_a_problem(begin: Start) -> None:
    texts = begin()
    assert all(map(texts.put, ("one", "two", "wrong", "three"))) and len(texts) == 4
    assert texts.get("two") is not None and texts.get("four") is None
    assert texts.answers(4) == {"one": "one", "two": "two", "wrong": "this text is wrong", "three": "three"}
    assert len(texts) == 0 and texts.get("two") is None and texts.counters() == {"texts_tokenized": 3}


def test_clients_take_turns(begin: Start) -> None:
    texts = begin()
    texts.keep_busy()
    for client, text in ((b"a", "a1"), (b"a", "a2"), (b"a", "a3"), (b"b", "b1"), (b"c", "c1")):
        assert texts.put(text, client)
    texts.go()
    texts.wait(6)
    assert tokenised(texts.folder) == ["wait", "a1", "b1", "c1", "a2", "a3"]


def test_one_client_fills_half_of_the_queue_and_all_together_fill_it(begin: Start) -> None:
    texts = begin(1000)
    texts.keep_busy()
    assert texts.put("a" * 400) and not texts.put("b" * 400)
    assert texts.put("c" * 400, b"b") and texts.put("d" * 400, b"c")  # the last one that begins below the limit
    assert not texts.put("e", b"d") and texts.get("e") is None
    texts.go()
    texts.wait(4)
    assert texts.put("b" * 2000) and texts.answers(1) == {"b" * 2000: "b" * 2000}  # a long one alone always fits


def test_a_process_that_dies_of_a_text_is_replaced_and_the_text_tried_once_more(begin: Start) -> None:
    texts = begin()
    assert all(map(texts.put, ("die once", "die", "last")))
    found = texts.answers(3)
    assert found.pop("die").startswith("the tokenising process died 2 times of this text")
    assert found == {"die once": "die once", "last": "last"}
    assert tokenised(texts.folder) == ["die once", "die once", "die", "die", "last"]
    assert texts.counters() == {"texts_tokenized": 2, "tokenizer_deaths": 3}


def test_a_process_that_dies_while_it_has_no_text_is_replaced(begin: Start) -> None:
    texts = begin()
    first = pid(texts.folder)
    os.kill(first, signal.SIGKILL)
    assert texts.put("one") and texts.answers(1) == {"one": "one"} and pid(texts.folder) != first


def test_while_it_cannot_be_started_texts_are_refused_for_now(begin: Start) -> None:
    texts = begin()
    (texts.folder / "broken").touch()
    assert texts.put("die once")
    (found,) = texts.wait(1)
    assert found.again and found.problem is not None and "does not start" in found.problem
    (texts.folder / "broken").unlink()
    assert texts.put("one") and texts.answers(1) == {"one": "one"}


def test_it_can_be_closed_while_a_text_is_tokenised(begin: Start) -> None:
    texts = begin()
    texts.keep_busy()
    assert texts.put("next")
    running = pid(texts.folder)
    texts.close()
    with pytest.raises(ProcessLookupError):
        os.kill(running, 0)
    assert list(texts.done()) == []


def test_a_process_that_does_not_start_is_an_error(tmp_path: Path) -> None:
    texts = Queue(tmp_path, 1)
    (tmp_path / "broken").touch()
    texts.start()
    with pytest.raises(TextError, match="does not start"):
        texts.ready()
    texts.close()
    absent = Texts([str(tmp_path / "absent")], lambda: None, 1, logging.getLogger("test"))
    with pytest.raises(TextError, match="does not start: .*No such file"):
        absent.start()
    absent.close()
