"""A streamed answer: server-sent events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from tetri.request import Token, token_ids
from tetri.wire.openai.asked import Asked
from tetri.wire.openai.errors import ApiError
from tetri.wire.openai.logprobs import TokenText
from tetri.wire.openai.reply import UNFINISHED, Reply, counted

_encode = msgspec.json.Encoder().encode
_DONE = b"data: [DONE]\n\n"
_REST = b',"finish_reason":null}]}\n\n'


class Stream(Reply):
    """One event a delta. An event ends with an empty line. `numbered`: each has a number as its `id`. Some clients read
    nothing but lines of data: vLLM's benchmark takes an id for broken JSON."""

    def __init__(self, asked: Asked, id: str, created: int, token_text: TokenText, *, numbered: bool = True) -> None:
        super().__init__(asked, id, created, token_text)
        self._numbered, self._number = numbered, 0  # of the last event
        count = len(self._tokens)
        self._opened = [False] * count
        self._held: dict[int, str] = {}  # by index of the choice
        # Most streams are plain: their events differ in number and text alone.
        self._plain = not (asked.ids or asked.running_usage or self._logprobs)
        self._after = (b'},"logprobs":null' if asked.chat else b',"logprobs":null') + _REST
        self._begin_events()

    def _begin_events(self) -> None:
        before = b'"delta":{"content":' if self._asked.chat else b'"text":'
        head, indexes = _encode(self._head)[:-1], range(len(self._tokens))
        self._before = [b'%b,"choices":[{"index":%d,%b' % (head, index, before) for index in indexes]

    def rename(self, id: str) -> None:
        super().rename(id)
        self._begin_events()

    def _kind(self) -> str:
        return "chat.completion.chunk" if self._asked.chat else "text_completion"

    def delta(self, prompt_index: int, choice: int, tokens: Sequence[Token], text: str) -> bytes:
        if not tokens and not text:
            return b""
        index = prompt_index * self._asked.n + choice
        if not self._plain or not self._opened[index]:
            return self._open(prompt_index, index) + self._output(prompt_index, index, tokens, text, None)
        if self._held or text.endswith(UNFINISHED):
            text = self._complete(index, text)
        return b"%bdata: %b%b%b" % (self._id(), self._before[index], _encode(text), self._after)

    def _id(self) -> bytes:
        """The line of the next event's number."""
        if not self._numbered:
            return b""
        self._number += 1
        return b"id: %d\n" % self._number

    def _complete(self, index: int, text: str) -> str:
        """The next text of a choice without what may be a part of a character. That is held until more follows, and
        dropped at the end."""
        text = self._held.pop(index, "") + text
        complete = text.rstrip(UNFINISHED)
        if complete != text:
            self._held[index] = text[len(complete) :]
        return complete

    def _open(self, prompt_index: int, index: int) -> bytes:
        """The event that begins a choice, in chat: its role."""
        if self._opened[index] or not self._asked.chat:
            return b""
        self._opened[index] = True
        choice = {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        more: dict[str, Any] = {"prompt_token_ids": self._prompt_ids[prompt_index]} if self._asked.ids else {}
        return self._chunk(prompt_index, index, choice, more)

    def _output(self, prompt_index: int, index: int, tokens: Sequence[Token], text: str, reason: str | None) -> bytes:
        choice: dict[str, Any] = {"index": index}
        text = self._complete(index, text)
        choice.update({"delta": {"content": text}} if self._asked.chat else {"text": text})
        choice["logprobs"] = self._logprobs[index].of(tokens) if self._logprobs else None
        choice["finish_reason"] = reason
        if reason is not None:
            choice["stop_reason"] = None
        if self._asked.ids:
            choice["token_ids"] = token_ids(tokens)
            if not self._opened[index]:
                choice["prompt_token_ids"] = self._prompt_ids[prompt_index]
        self._opened[index] = True
        self._tokens[index] += len(tokens)
        return self._chunk(prompt_index, index, choice, {})

    def _chunk(self, prompt_index: int, index: int, choice: dict[str, Any], more: dict[str, Any]) -> bytes:
        if self._asked.running_usage:
            more = {**more, "usage": counted(self._prompt_tokens[prompt_index], self._tokens[index])}
        return self._event({**self._head, "choices": [choice], **more})

    def _event(self, value: dict[str, Any]) -> bytes:
        return b"%bdata: %b\n\n" % (self._id(), _encode(value))

    def _last(self, prompt_index: int, index: int, reason: str, tokens: Sequence[Token], text: str) -> bytes:
        return self._open(prompt_index, index) + self._output(prompt_index, index, tokens, text, reason)

    def finish(self) -> bytes:
        more: dict[str, Any] = {"usage": self._usage()} if self._asked.usage else {}
        more.update(self._tetri())
        return (self._event({**self._head, "choices": [], **more}) if more else b"") + _DONE

    def fail(self, error: ApiError) -> bytes:
        return b"%bdata: %b\n\n%b" % (self._id(), error.body(), _DONE)
