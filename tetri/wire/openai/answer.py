"""An unstreamed answer: one JSON body."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from tetri.request import Token, token_ids
from tetri.wire.openai.asked import Asked
from tetri.wire.openai.errors import ApiError
from tetri.wire.openai.logprobs import TokenText
from tetri.wire.openai.reply import UNFINISHED, Reply


class Answer(Reply):
    """Gathers the output of all choices; only `finish` and `fail` return bytes."""

    def __init__(self, asked: Asked, id: str, created: int, token_text: TokenText) -> None:
        super().__init__(asked, id, created, token_text)
        count = len(self._tokens)
        self._texts: list[list[str]] = [[] for _ in range(count)]
        self._output: list[list[Token]] = [[] for _ in range(count)]
        self._reasons: list[str | None] = [None] * count

    def _kind(self) -> str:
        return "chat.completion" if self._asked.chat else "text_completion"

    def delta(self, prompt_index: int, choice: int, tokens: Sequence[Token], text: str) -> bytes:
        self._gather(prompt_index * self._asked.n + choice, tokens, text)
        return b""

    def _gather(self, index: int, tokens: Sequence[Token], text: str) -> None:
        self._texts[index].append(text)
        self._output[index].extend(tokens)

    def _last(self, prompt_index: int, index: int, reason: str, tokens: Sequence[Token], text: str) -> bytes:
        self._gather(index, tokens, text)
        self._reasons[index] = reason
        return b""

    def finish(self) -> bytes:
        body = {**self._head, "choices": [self._choice(index) for index in range(len(self._tokens))]}
        body["usage"] = self._usage()
        if self._asked.chat and self._asked.ids:
            body["prompt_token_ids"] = self._prompt_ids[0]
        return msgspec.json.encode({**body, **self._tetri()})

    def _choice(self, index: int) -> dict[str, Any]:
        text, tokens = "".join(self._texts[index]).rstrip(UNFINISHED), self._output[index]
        choice: dict[str, Any] = {"index": index}
        if self._asked.chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        choice["logprobs"] = self._logprobs[index].of(tokens) if self._logprobs else None
        choice.update(finish_reason=self._reasons[index], stop_reason=None)
        if self._asked.ids:
            choice["token_ids"] = token_ids(tokens)
            if not self._asked.chat:
                choice["prompt_token_ids"] = self._prompt_ids[index // self._asked.n]
        return choice

    def fail(self, error: ApiError) -> bytes:
        return error.body()
