"""What streamed and unstreamed answers have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from tetri.request import Token, Usage
from tetri.wire.openai.asked import Asked
from tetri.wire.openai.errors import ApiError, end_problem
from tetri.wire.openai.logprobs import Logprobs, TokenText, chat_logprobs, completion_logprobs

# What decoding makes of a part of a character. As in vLLM, no answer ends with it.
UNFINISHED = "\ufffd"


class Reply(ABC):
    """The answer to what was asked. `created`: Unix time. `token_text` is called only for log probabilities. Each
    method but `accepted` and `rename` returns bytes to send at once, perhaps none."""

    def __init__(self, asked: Asked, id: str, created: int, token_text: TokenText) -> None:
        prompts: list[Any] = [None] if asked.chat else asked.prompts
        count = len(prompts) * asked.n
        self._asked = asked
        self._head = {"id": id, "object": self._kind(), "created": created, "model": asked.model}
        self._prompt_ids: list[list[int] | None] = [ids if isinstance(ids, list) else None for ids in prompts]
        self._prompt_tokens = [len(ids or ()) for ids in self._prompt_ids]
        # the rest by index of the choice in the answer
        self._tokens = [0] * count
        self._records: dict[int, Mapping[str, Any]] = {}
        self._logprobs: list[Logprobs] | None = None
        if asked.sampling.logprobs is not None:
            kind = chat_logprobs if asked.chat else completion_logprobs
            self._logprobs = [Logprobs(kind, token_text, asked.ids_as_tokens) for _ in range(count)]

    def rename(self, id: str) -> None:
        """Give the answer another id, before its first delta."""
        self._head["id"] = id

    @abstractmethod
    def _kind(self) -> str:
        """The type of the answer's objects."""

    def accepted(self, prompt_index: int, prompt_tokens: int, prompt_ids: list[int] | None = None) -> None:
        """The broker has accepted a prompt. Call it before the first delta if `asked.running_usage`, and with
        `prompt_ids` if `asked.ids` and the prompt is a text."""
        self._prompt_tokens[prompt_index] = prompt_tokens
        if prompt_ids is not None:
            self._prompt_ids[prompt_index] = prompt_ids

    @abstractmethod
    def delta(self, prompt_index: int, choice: int, tokens: Sequence[Token], text: str) -> bytes:
        """Output of a choice."""

    def end(
        self,
        prompt_index: int,
        choice: int,
        reason: str,
        usage: Usage,
        tokens: Sequence[Token] = (),
        text: str = "",
        *,
        error: str | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> bytes:
        """The end of a choice and the output that came with it. `record`: what the answer is to tell of how the choice
        was served. Raises ApiError for an end that leaves the answer incomplete."""
        if (problem := end_problem(reason, error)) is not None:
            raise problem
        index = prompt_index * self._asked.n + choice
        if record is not None:
            self._records[index] = record
        data = self._last(prompt_index, index, reason, tokens, text)
        self._prompt_tokens[prompt_index], self._tokens[index] = usage.prompt_tokens, usage.completion_tokens
        return data

    @abstractmethod
    def _last(self, prompt_index: int, index: int, reason: str, tokens: Sequence[Token], text: str) -> bytes:
        """The last output of a choice."""

    @abstractmethod
    def finish(self) -> bytes:
        """The end of the answer, after that of all choices."""

    @abstractmethod
    def fail(self, error: ApiError) -> bytes:
        """The end of the answer when it cannot be completed."""

    def _usage(self) -> dict[str, int]:
        return counted(sum(self._prompt_tokens), sum(self._tokens))

    def _tetri(self) -> dict[str, Any]:
        """How the choices were served, where somebody wants to know."""
        choices = [{"index": index, **record} for index, record in sorted(self._records.items())]
        return {"tetri": {"choices": choices}} if choices else {}


def counted(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Tokens as the API counts them."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "total_tokens": total, "completion_tokens": completion_tokens}
