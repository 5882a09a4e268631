"""Log probabilities of output tokens, in the shapes of completions and of chat."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any

from tetri.request import Token, TokenLogprob

TokenText = Callable[[int], bytes]  # the bytes of a token; of a special token its name
_LEAST = -9999.0  # stands for -inf, which JSON does not have


class Spelled:
    """A token, or another that could have stood in its place."""

    __slots__ = ("bytes", "logprob", "text")

    def __init__(self, text: str, raw: bytes, logprob: float) -> None:
        self.text, self.bytes, self.logprob = text, raw, max(logprob, _LEAST)


# shapes tokens, each with the most likely ones in its place, of a choice whose text has `offset` characters so far
Shape = Callable[[list[tuple[Spelled, list[Spelled]]], int], dict[str, Any]]


class Logprobs:
    """Log probabilities of a choice. A character of several tokens is the text of the last of them; the others have
    none. `as_ids`: the text of a token is its id."""

    def __init__(self, shape: Shape, token_text: TokenText, as_ids: bool) -> None:
        self._shape, self._token_text, self._as_ids = shape, token_text, as_ids
        self._begun = b""  # of a character whose other bytes are in tokens to come
        self._offset = 0

    def of(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """The JSON value for the next tokens."""
        spelled = []
        for token in tokens:
            assert isinstance(token, TokenLogprob)  # since log probabilities were asked for
            top = [self._spelled(id, logprob)[0] for id, logprob in token.top.items()]
            chosen, self._begun = self._spelled(token.id, token.logprob)
            spelled.append((chosen, top))
        value = self._shape(spelled, self._offset)
        self._offset += sum(len(chosen.text) for chosen, _ in spelled)
        return value

    def _spelled(self, id: int, logprob: float) -> tuple[Spelled, bytes]:
        raw = self._token_text(id)
        try:
            text, rest = raw.decode(), b""
        except UnicodeDecodeError:
            data = self._begun + raw
            text, length = codecs.utf_8_decode(data, "replace", False)
            rest = data[length:]
        return Spelled(f"token_id:{id}" if self._as_ids else text, raw, logprob), rest


def completion_logprobs(spelled: list[tuple[Spelled, list[Spelled]]], offset: int) -> dict[str, Any]:
    """The shape of completions: one list a column. The token itself is the first of the most likely ones."""
    return {
        "text_offset": [*accumulate((len(chosen.text) for chosen, _ in spelled), initial=offset)][:-1],
        "token_logprobs": [chosen.logprob for chosen, _ in spelled],
        "tokens": [chosen.text for chosen, _ in spelled],
        "top_logprobs": [_by_text((chosen, *top)) for chosen, top in spelled],
    }


def _by_text(tokens: Iterable[Spelled]) -> dict[str, float]:
    """Log probabilities by text: of tokens with the same text, the first one's."""
    found: dict[str, float] = {}
    for token in tokens:
        found.setdefault(token.text, token.logprob)
    return found


def chat_logprobs(spelled: list[tuple[Spelled, list[Spelled]]], offset: int) -> dict[str, Any]:
    """The shape of chat: one object a token."""
    return {"content": [{**_chat(chosen), "top_logprobs": [_chat(each) for each in top]} for chosen, top in spelled]}


def _chat(token: Spelled) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": [*token.bytes]}
