"""The broker's loop with texts: they are tokenised elsewhere, and what is refused is not tokenised at all."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Event
from typing import Any, cast

import pytest
from live import wait_until
from played_tokenizer import command, tokenised

from tests.core.broker.serving import serving
from tests.core.build import capacity, staged, tokens
from tetri.core.broker.broker import Broker
from tetri.net.hub import Hub
from tetri.proc.broker import ActionExecutor
from tetri.proc.texts import Texts
from tetri.request import AskedSampling, Stage, Turn
from tetri.text import ByteTokenizer
from tetri.wire.clients import Accepted, Cancel, Delta, Done, Inspect, Observe, Refused, Submit
from tetri.wire.events import Arrived

SECRET = "s" * 22


class PlayedHub:
    """`sent`: what clients were answered."""

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter()
        self.unsent: Counter[str] = Counter()
        self.arrived: list[Arrived] = []
        self.sent: list[tuple[bytes, Any]] = []
        self.woken = Event()

    def poll(self, timeout: float | None) -> list[Arrived]:
        if not self.arrived:
            self.woken.wait(timeout)
        self.woken.clear()
        arrived, self.arrived = self.arrived, []
        return arrived

    def reply(self, client: bytes, message: Any) -> str:
        self.sent.append((client, message))
        return "sent"

    def send(self, peer: str, message: Any) -> bool:
        return True

    def connect(self, peer: str, address: str) -> None: ...
    def disconnect(self, peer: str) -> None: ...


class DeafTokenizer(ByteTokenizer):
    """The broker's own one: it only detokenises."""

    def encode(self, text: str) -> list[int]:
        raise AssertionError("the broker's thread tokenises")

    def chat(self, turns: Sequence[Turn]) -> list[int]:
        raise AssertionError("the broker's thread renders a template")


class Loop:
    """A broker's loop on a core, with workers p1 and d1."""

    def __init__(self, folder: Path, most_bytes: int = 1 << 20, **limits: Any) -> None:
        limits = {"context": 4096, "vocabulary": 256, **limits}
        workers = [(iid, {"capacity": capacity(blocks=1 << 14, context=1 << 16)}) for iid in ("p1", "d1")]
        self.core: Broker = serving(*workers, limits=limits).core
        self.hub, self.folder = PlayedHub(), folder
        logger = logging.getLogger("test")
        os.mkfifo(folder / "go")
        self.texts = Texts(command(folder), self.hub.woken.set, most_bytes, logger)
        self.texts.start()
        self.texts.ready()
        self.executor = ActionExecutor(self.core, cast(Hub, self.hub), DeafTokenizer(), self.texts, logger)

    def handle(self, *events: Any) -> list[tuple[bytes, Any]]:
        """What clients are answered when the core gets these events."""
        before = len(self.hub.sent)
        for event in events:
            self.executor.act(self.core.handle(event, self.executor.clock.now()))
        return self.hub.sent[before:]

    def turn(self, *messages: tuple[bytes, Any], timeout: float = 0.0) -> list[tuple[bytes, Any]]:
        """What clients are answered in one turn of the loop, in which these messages arrive."""
        before = len(self.hub.sent)
        self.hub.arrived += [Arrived(message, client) for client, message in messages]
        for event in self.executor.poll(timeout):
            self.handle(event)
        return self.hub.sent[before:]

    def answer(self, key: str, kind: type | tuple[type, ...] = (Accepted, Refused)) -> Any:
        """Turn until the Submit of this key is answered."""

        def answers() -> list[Any]:
            self.turn(timeout=0.01)
            return [message for _, message in self.hub.sent if isinstance(message, kind) and message.key == key]

        wait_until(lambda: bool(answers()), f"no answer to {key}")
        return answers()[0]

    def keep_busy(self) -> None:
        """Let a text of another client be tokenised until `go`."""
        assert self.turn((b"other", submit("wait", "wait"))) == []
        wait_until(lambda: tokenised(self.folder) == ["wait"], "it does not begin")

    def go(self) -> None:
        (self.folder / "go").write_bytes(b"")


def submit(key: str, prompt: str | list[int] | None, secret: str = SECRET, **fields: Any) -> Submit:
    sampling = fields.pop("sampling", AskedSampling(max_tokens=8))
    return Submit(key=key, secret=secret, prompt=prompt, sampling=sampling, **fields)


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    made = Loop(tmp_path, max_open=3)
    yield made
    made.texts.close()


def test_streams_go_on_while_a_text_is_tokenised(loop: Loop) -> None:
    ((_, accepted),) = loop.turn((b"c", submit("ids", [1, 2, 3])))
    rid = accepted.rid
    loop.keep_busy()
    for index in range(7):
        iid = "d1" if index else "p1"
        found = loop.handle(tokens(iid, rid, index, 65 + index), staged("d1", rid, Stage.DECODE))
        assert found == [(b"c", Delta(rid=rid, start=index, ids=[65 + index], text=chr(65 + index)))]
    assert loop.turn((b"c", submit("late", [5])))[0][1].prompt_tokens == 1  # token ids wait for no text
    loop.go()
    assert loop.answer("wait").prompt_tokens == 4


def test_the_time_of_a_text_counts_from_its_arrival(loop: Loop) -> None:
    loop.keep_busy()
    now, begin = loop.executor.clock.now, loop.executor.clock.now()
    assert loop.turn((b"c", submit("k", "four", deadline_s=0.01))) == []
    wait_until(lambda: now() > begin + 0.02, "time stands still")
    loop.go()
    assert loop.answer("k").prompt_tokens == 4
    before = len(loop.hub.sent)
    loop.executor.act(loop.core.tick(now()))
    ((_, done),) = loop.hub.sent[before:]
    assert isinstance(done, Done) and done.reason == "deadline" and done.jct_s > 0.01
    assert done.timeline["queued"] == pytest.approx(done.jct_s)


def test_a_text_that_is_cancelled_while_it_waits_ends_as_soon_as_it_is_tokenised(loop: Loop) -> None:
    loop.keep_busy()
    assert loop.turn((b"c", submit("k", "text")), (b"c", submit("other", "text"))) == []
    ((_, refused),) = loop.turn((b"d", Cancel(rid="k", secret="x" * 32)))
    assert isinstance(refused, Refused)
    assert loop.turn((b"c", Cancel(rid="k", secret=SECRET))) == []
    loop.go()
    rid = loop.answer("k", Accepted).rid
    (done,) = [message for _, message in loop.hub.sent if isinstance(message, Done)]
    assert (done.rid, done.reason) == (rid, "cancelled")
    assert loop.answer("other").rid in loop.core.table.requests


def test_a_repeated_text_is_tokenised_once_and_its_last_client_is_answered(loop: Loop) -> None:
    loop.keep_busy()
    first = submit("k", "text")
    assert loop.turn((b"c", first), (b"d", first)) == []
    loop.go()
    accepted = loop.answer("k")
    assert [client for client, message in loop.hub.sent if message is accepted] == [b"d"]
    assert tokenised(loop.folder) == ["wait", "text"]
    assert loop.turn((b"e", first))[0] == (b"e", accepted)  # known to the core by now
    assert tokenised(loop.folder) == ["wait", "text"]


@pytest.mark.parametrize(
    "other",
    [submit("k", "other"), submit("k", [1, 2]), submit("k", "text", "t" * 22), submit("k", "text", deadline_s=9.0)],
)
def test_another_request_with_the_key_of_a_text_that_waits_is_refused(loop: Loop, other: Submit) -> None:
    loop.keep_busy()
    assert loop.turn((b"c", submit("k", "text"))) == []
    ((client, refused),) = loop.turn((b"thief", other))
    assert client == b"thief" and refused.reason.startswith("this key stands for another request")
    loop.go()
    assert loop.answer("k", Accepted).prompt_tokens == 4  # of the first one, as if nothing had been
    assert tokenised(loop.folder) == ["wait", "text"]


def test_beyond_max_open_a_text_is_refused_until_later_and_not_tokenised(loop: Loop) -> None:
    loop.keep_busy()
    assert loop.turn((b"c", submit("k", "text"))) == []
    assert isinstance(loop.turn((b"c", submit("ids", [1])))[0][1], Accepted)
    found = loop.turn(*((b"c", submit(f"late {number}", prompt)) for number, prompt in enumerate(("text", [1]))))
    full = [Refused(key=f"late {n}", reason="3 choices are open, try later", retry_after_s=1.0) for n in range(2)]
    assert [message for _, message in found] == full
    loop.go()
    loop.answer("k")
    assert tokenised(loop.folder) == ["wait", "text"]


def test_beyond_max_mib_a_text_is_refused_until_later_and_not_tokenised(tmp_path: Path) -> None:
    loop = Loop(tmp_path, max_mib=1, context=1 << 16)
    large = AskedSampling(max_tokens=14_000)  # 340,096 bytes and the prompt
    loop.turn(*((b"c", submit(f"k{number}", [1], sampling=large)) for number in range(3)))
    ((_, refused),) = loop.turn((b"c", submit("late", "text", sampling=large)))
    assert refused.reason == "the requests here may need 1 of 1 MiB, try later" and refused.retry_after_s == 1.0
    assert loop.turn((b"c", submit("small", "small"))) == []
    assert loop.answer("small").prompt_tokens == 5 and tokenised(tmp_path) == ["small"]
    loop.texts.close()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"secret": "s" * 21}, "the secret has 21 characters"),
        ({"deadline_s": 0.0}, "deadline_s must be above 0"),
        ({"prompt": "a" * 300_000}, "far more than the context holds"),
        ({"prompt": None}, "exactly one of prompt and messages"),
        ({"sampling": AskedSampling(max_tokens=4096)}, "max_tokens is 4096"),
    ],
)
def test_what_can_be_refused_at_once_is_not_tokenised(loop: Loop, wrong: dict[str, Any], says: str) -> None:
    ((_, refused),) = loop.turn((b"c", submit(**{"key": "k", "prompt": "text", **wrong})))
    assert says in refused.reason and refused.retry_after_s is None
    assert loop.turn((b"c", submit("good", "good"))) == []
    assert loop.answer("good").prompt_tokens == 4 and tokenised(loop.folder) == ["good"]


def test_when_the_queue_is_full_a_text_is_refused_until_later(tmp_path: Path) -> None:
    loop = Loop(tmp_path, most_bytes=100)
    loop.keep_busy()
    found = loop.turn(*((b"c", submit(f"k{number}", "a" * 30)) for number in range(3)))
    busy = "too many texts wait to be tokenized, try later"
    assert [message for _, message in found] == [
        Refused(key=f"k{number}", reason=busy, retry_after_s=1.0) for number in (1, 2)
    ]
    loop.go()
    assert loop.answer("k0").prompt_tokens == 30
    loop.texts.close()


def test_a_text_that_cannot_be_tokenised_is_refused_and_deaths_show_in_the_status(loop: Loop) -> None:
    loop.turn((b"c", submit("k", "wrong")))
    assert loop.answer("k") == Refused(key="k", reason="this text is wrong")
    loop.turn((b"c", submit("d", "die")))
    refused = loop.answer("d")
    assert refused.reason.startswith("the tokenising process died 2 times of this text")
    assert refused.retry_after_s is None
    (status,) = [message for _, message in loop.turn((b"c", Inspect()))]
    assert status.counters["tokenizer_deaths"] == 2 and status.counters["texts_tokenized"] == 0
    assert status.notes[-1] == "the tokenising process died 2 times"


def test_what_the_core_never_sees_is_counted_as_refused_too(tmp_path: Path) -> None:
    loop = Loop(tmp_path, most_bytes=100)
    loop.keep_busy()
    asked = [submit("long", [1] * 4096), submit("vague", None), submit("a", "a" * 30), submit("b", "b" * 30)]
    loop.turn(*((b"c", each) for each in [*asked, submit("a", "other")]), (b"c", submit("ids", [256])))
    loop.go()
    loop.answer("a", Accepted)
    loop.turn((b"c", submit("k", "wrong")))
    loop.answer("k")  # by the tokenizer
    (found,) = [message for _, message in loop.turn((b"o", Observe()))]
    refused = {reason: count for reason, count in found.measures.counts["requests_refused"].items() if count}
    assert refused == {"invalid": 3, "too_long": 1, "full": 1, "repeated_key": 1}
    (status,) = [message for _, message in loop.turn((b"o", Inspect()))]
    assert found.status == status and status.counters["texts_tokenized"] == 2
    loop.texts.close()
