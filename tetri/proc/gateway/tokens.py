"""Tokenises texts for a gateway, in a process of their own: that keeps Python's interpreter lock, and streams go on."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from logging import Logger

import msgspec

from tetri.proc.texts import TokenizerProcess
from tetri.proc.tokenizer import Question
from tetri.request import Turn
from tetri.text import TextError, Tokenizer
from tetri.wire.openai import ApiError

MOST_WAITING = 64  # texts
_encode = msgspec.msgpack.Encoder().encode


class Tokens:
    """Texts wait for each other. The process starts with the first one, and again after one that killed it."""

    def __init__(self, command: Sequence[str], logger: Logger) -> None:
        self._command, self._log = command, logger
        self._process: TokenizerProcess | None = None
        self._thread = ThreadPoolExecutor(1, "tokens")  # talks to the process, one text at a time
        self._waiting = 0
        self._closed = False

    async def ids(self, prompt: str | None, turns: Sequence[Turn] | None) -> list[int]:
        """The token ids of a prompt or a conversation. Raises ApiError."""
        if self._waiting >= MOST_WAITING:
            raise ApiError(503, "too many texts wait to be tokenized, try later")
        question = _encode(Question(prompt, None if turns is None else [*turns]))
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._tokenise, question)
        finally:
            self._waiting -= 1

    def _tokenise(self, question: bytes) -> list[int]:
        try:
            answer = self._running().tokenise(question)
        except (EOFError, OSError, TextError) as error:
            self._drop()
            if not self._closed:
                self._log.error("the tokenising process died (%s) bytes=%d", error or "no reason", len(question))
            raise ApiError(503, "the text could not be tokenized, try later") from None
        if answer.problem is not None:
            raise ApiError(400, answer.problem)
        return list(array("I", answer.ids))

    def _running(self) -> TokenizerProcess:
        if self._process is None:
            self._process = TokenizerProcess(self._command)
            self._process.loaded()
        return self._process

    def _drop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.close()

    def close(self) -> None:
        """End the process; texts that wait are dropped."""
        self._closed = True
        self._thread.shutdown(wait=False, cancel_futures=True)
        if (process := self._process) is not None:
            process.kill()
        self._thread.shutdown()
        self._drop()


def bare(ids: list[int], around: list[int]) -> list[int]:
    """Token ids of a prompt without those that the model expects around it, which are those of the empty prompt."""
    for before in range(len(around), -1, -1):
        after = len(around) - before
        if ids[:before] == around[:before] and ids[len(ids) - after :] == around[before:]:
            return ids[before : len(ids) - after]
    return ids


def token_text(tokenizer: Tokenizer) -> Callable[[int], bytes]:
    """A function from a token id to its bytes; for a special token, those of its name."""
    names = {number: name.encode() for name, number in tokenizer.specials.items()}
    return lambda number: names.get(number) or tokenizer.token_bytes(number)
