"""The texts that wait to be tokenised, and the process that tokenises them one by one (tetri/proc/tokenizer.py).

A thread talks to the process, so the broker's loop never waits for it. The clients take turns: a client with many long
texts does not delay those of others by more than one text. If the process dies, it is started again.
"""

from __future__ import annotations

import subprocess
import sys
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hmac import compare_digest
from logging import Logger
from multiprocessing import Pipe
from threading import Condition, Thread

import msgspec

from tetri import log
from tetri.config import Config
from tetri.core.actions import FromClient
from tetri.models import find
from tetri.proc.tokenizer import Answer, Question
from tetri.text import TextError
from tetri.wire.clients import Submit

TRIES = 2  # how often a text is tokenised when the process dies from it
LIMIT_S = 60.0  # a text that takes longer counts as one that kills the process
DOES_NOT_START = "the tokenising process does not start"
_answers = msgspec.msgpack.Decoder(Answer)
_encoder = msgspec.msgpack.Encoder()


@dataclass(slots=True)
class Waiting:
    """A Submit whose text is not tokenised yet. `message` is without the text, which is in `question`. `client`: who
    gets the answer; `owner`: the client that sent it first. `content`: the digest of all that is asked for. `since`:
    when it arrived, in seconds. `cancel`: a Cancel that came meanwhile."""

    client: bytes
    owner: bytes
    message: Submit
    content: bytes
    since: float
    question: bytes
    cancel: FromClient | None = None

    def owned_by(self, secret: str) -> bool:
        """Whether this is the secret of the Submit."""
        return compare_digest(self.message.secret.encode(), secret.encode())

    def repeated_by(self, message: Submit, content: bytes) -> bool:
        """Whether a Submit with the same key is a repetition of this one, and not another request."""
        return self.owned_by(message.secret) and self.content == content


@dataclass(frozen=True, slots=True)
class Tokenised:
    """A text that has been tokenised. `problem`: why it has no `ids`. `again`: whether another try may succeed."""

    waiting: Waiting
    ids: Sequence[int] = ()
    problem: str | None = None
    again: bool = False


def command(config: Config) -> list[str]:
    """How to start the tokenising process; the descriptor of its connection is put in place of `{}`. Raises
    ModelError."""
    folder = "" if config.engine.kind == "emulated" else str(find(config.model.name))
    specials = "yes" if config.model.special_tokens_in_prompt else ""
    # -P: what lies in the folder in which the broker was started is no part of tetri.
    return [sys.executable, "-P", "-m", "tetri.proc.tokenizer", "{}", folder, specials]


class TokenizerProcess:
    """One tokenising process."""

    def __init__(self, command: Sequence[str]) -> None:
        """Start it. Raises OSError."""
        self._connection, its = Pipe()
        try:
            arguments = [str(its.fileno()) if part == "{}" else part for part in command]
            self._process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, pass_fds=[its.fileno()])
        except OSError:
            self._connection.close()
            raise
        finally:
            its.close()

    def loaded(self) -> None:
        """Wait until it has loaded its tokenizer. Raises TextError, and EOFError or OSError if it has died."""
        problem = self._answer().problem
        if problem is not None:
            raise TextError(problem)

    def tokenise(self, question: bytes) -> Answer:
        """Tokenise a text. Raises EOFError or OSError if the process has died, or is too slow."""
        self._connection.send_bytes(question)
        return self._answer()

    def _answer(self) -> Answer:
        if not self._connection.poll(LIMIT_S):
            raise TimeoutError(f"no answer for {LIMIT_S:g} s")
        return _answers.decode(self._connection.recv_bytes())

    def kill(self) -> None:
        """End it; whoever waits for it gets an EOFError. Callable from any thread."""
        self._process.kill()

    def close(self) -> None:
        """End it and close the connection."""
        self._process.kill()
        self._process.wait()
        self._connection.close()


class Texts:
    """A bounded queue of texts, and the thread and the process that tokenise them. Belongs to the broker's thread.
    `len()`: the texts that are not tokenised yet.

    `wake` is called, from the other thread, when `done` has something. `most_bytes`: of all texts that wait."""

    def __init__(self, command: Sequence[str], wake: Callable[[], None], most_bytes: int, logger: Logger) -> None:
        self.tokenised = self.deaths = 0  # texts; processes that died
        self._command, self._wake, self._most_bytes, self._log = command, wake, most_bytes, logger
        self._waiting: dict[str, Waiting] = {}  # by key
        self._bytes = 0  # of the texts that wait
        self._bytes_of: Counter[bytes] = Counter()  # likewise, by client
        self._turns: dict[bytes, deque[Waiting]] = {}  # by client; the first client is next
        self._done: deque[Tokenised] = deque()
        self._changed = Condition()  # guards `_turns`, `_process` and `_closing`
        self._closing = False
        self._process: TokenizerProcess | None = None
        self._thread = Thread(target=self._work, name="texts", daemon=True)

    # ------------------------------------------------------------ the broker's thread

    def start(self) -> None:
        """Start the process; `ready` must follow. Raises TextError."""
        try:
            self._process = TokenizerProcess(self._command)
        except OSError as error:
            raise TextError(f"{DOES_NOT_START}: {_line(error)}") from None

    def ready(self) -> None:
        """Wait until the process can tokenise. Raises TextError."""
        self._load()
        self._thread.start()

    def _load(self) -> None:
        assert self._process is not None
        try:
            self._process.loaded()
        except (EOFError, OSError) as error:
            raise TextError(f"{DOES_NOT_START}: {_line(error)}") from None

    def __len__(self) -> int:
        return len(self._waiting)

    def get(self, key: str) -> Waiting | None:
        """The text of this key that is not tokenised yet."""
        return self._waiting.get(key)

    def add(self, client: bytes, message: Submit, content: bytes, now: float) -> bool:
        """Queue the text of a Submit. False: the queue is full, or half full of this client's texts, so that others
        find a place. A client's first text fits as long as the queue has any space left."""
        question = _encoder.encode(Question(message.prompt, message.messages))  # type: ignore[arg-type]
        own = self._bytes_of.get(client, 0)
        if self._bytes >= self._most_bytes or (own and own + len(question) > self._most_bytes // 2):
            return False
        bare = message.changed(prompt=None, messages=None)
        waiting = self._waiting[message.key] = Waiting(client, client, bare, content, now, question)
        self._count(client, len(question))
        with self._changed:
            self._turns.setdefault(client, deque()).append(waiting)
            self._changed.notify()
        return True

    def done(self) -> Iterator[Tokenised]:
        """Yield the texts that were tokenised since the last call."""
        while self._done:
            found = self._done.popleft()
            waiting = self._waiting.pop(found.waiting.message.key)
            self._count(waiting.owner, -len(waiting.question))
            self.tokenised += found.problem is None
            yield found

    def _count(self, client: bytes, size: int) -> None:
        self._bytes += size
        self._bytes_of[client] += size
        if not self._bytes_of[client]:
            del self._bytes_of[client]

    def counters(self) -> dict[str, int]:
        """For the Status."""
        deaths = {"tokenizer_deaths": self.deaths} if self.deaths else {}
        return {"texts_tokenized": self.tokenised, **deaths}

    def close(self) -> None:
        """End the process and the thread. Texts that wait are dropped."""
        with self._changed:
            self._closing = True
            self._changed.notify()
            if self._process is not None:
                self._process.kill()
        if self._thread.is_alive():
            self._thread.join()
        if self._process is not None:
            self._process.close()

    # ------------------------------------------------------------ the other thread

    def _work(self) -> None:
        while (waiting := self._next()) is not None:
            found = self._tokenise(waiting)
            if self._closing:
                return
            self._done.append(found)
            self._wake()

    def _next(self) -> Waiting | None:
        """Wait for a text, of each client in turn; None when the queue is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._turns or self._closing)
            if self._closing:
                return None
            client, texts = next(iter(self._turns.items()))
            del self._turns[client]
            waiting = texts.popleft()
            if texts:
                self._turns[client] = texts
            return waiting

    def _tokenise(self, waiting: Waiting) -> Tokenised:
        why = ""
        for _ in range(TRIES):
            try:
                process = self._running()
            except TextError as error:  # not because of this text
                self._drop_process()
                return Tokenised(waiting, problem=str(error), again=True)
            try:
                answer = process.tokenise(waiting.question)
            except (EOFError, OSError) as error:
                self._drop_process()
                if self._closing:
                    break
                self.deaths, why = self.deaths + 1, _line(error)
                self._log.error("the tokenising process died %s", log.fields(why=why, bytes=len(waiting.question)))
            else:
                return Tokenised(waiting, array("I", answer.ids), answer.problem)
        return Tokenised(waiting, problem=f"the tokenising process died {TRIES} times of this text ({why})")

    def _running(self) -> TokenizerProcess:
        """The process, started again if it has died. Raises TextError if that fails."""
        if self._process is None:
            with self._changed:
                if self._closing:
                    raise TextError("the broker ends")
                self.start()
            self._load()
        assert self._process is not None
        return self._process

    def _drop_process(self) -> None:
        with self._changed:
            process, self._process = self._process, None
        if process is not None:
            process.close()


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or "it has died"
