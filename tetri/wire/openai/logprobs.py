"""Log probabilities of output tokens, in the shapes of completions and of chat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from tetri.request import Token, TokenLogprob

TokenText = Callable[[int], bytes]  # the bytes of a token; of a special token its name
_LEAST = -9999.0  # stands for -inf, which JSON does not have
_MOST_PARTS = 4  # of a character


class Spelled:
    """A token, or another that could have stood in its place. `text`: what it adds to the output; `shown`: its name in
    the answer."""

    __slots__ = ("id", "logprob", "shown", "text")

    def __init__(self, id: int, text: str, shown: str, logprob: float) -> None:
        self.id, self.text, self.shown, self.logprob = id, text, shown, max(logprob, _LEAST)


# A token, then the most likely ones in its place but for itself; and how many of these were asked for.
Place = tuple[list[Spelled], int]
# shapes the tokens of a choice whose output has `offset` characters so far
Shape = Callable[[list[Place], int], dict[str, Any]]


class Logprobs:
    """Log probabilities of a choice. `as_ids`: tokens are shown by their ids. As in vLLM, a character of several tokens
    is the text of the last of them, and the others have none."""

    def __init__(self, shape: Shape, token_text: TokenText, as_ids: bool) -> None:
        self._shape, self._token_text, self._as_ids = shape, token_text, as_ids
        self._parts: tuple[bytes, ...] = ()  # the tokens before the next one, as far as they are parts of characters
        self._offset = 0

    def of(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """The JSON value for the next tokens."""
        places = []
        for token in tokens:
            assert isinstance(token, TokenLogprob)  # since log probabilities were asked for
            chosen, *others = {token.id: token.logprob, **token.top}.items()
            places.append(([self._spelled(*chosen), *(self._spelled(*other) for other in others)], len(token.top)))
            raw = self._token_text(token.id)
            self._parts = (*self._parts, raw)[-_MOST_PARTS:] if _is_part(raw.decode("utf-8", "replace")) else ()
        value = self._shape(places, self._offset)
        self._offset += sum(len(place[0].shown) for place, _ in places)
        return value

    def _spelled(self, id: int, logprob: float) -> Spelled:
        raw = self._token_text(id)
        text = raw.decode("utf-8", "replace")
        if _is_part(text):
            text = self._completed(raw)
        return Spelled(id, text, f"token_id:{id}" if self._as_ids else text, logprob)

    def _completed(self, raw: bytes) -> str:
        """The character that ends with this token; empty if none does."""
        for count in range(1, len(self._parts) + 1):
            text = b"".join((*self._parts[-count:], raw)).decode("utf-8", "replace")
            if not _is_part(text):
                return text
        return ""


def _is_part(text: str) -> bool:
    """Whether the text of a token ends within a character."""
    return text.endswith("\ufffd")


def completion_logprobs(places: list[Place], offset: int) -> dict[str, Any]:
    """The shape of completions: one list a column. The token itself is the first of the most likely ones."""
    chosen = [place[0] for place, _ in places]
    return {
        "text_offset": [*accumulate((len(token.shown) for token in chosen), initial=offset)][:-1],
        "token_logprobs": [token.logprob for token in chosen],
        "tokens": [token.shown for token in chosen],
        "top_logprobs": [{token.shown: token.logprob for token in place} for place, _ in places],
    }


def chat_logprobs(places: list[Place], offset: int) -> dict[str, Any]:
    """The shape of chat: one object a token. The token itself is the first of the most likely ones, in the place of the
    least likely one if it is none of them."""
    return {
        "content": [
            {**_chat(place[0], place[0].text), "top_logprobs": [_chat(token, token.shown) for token in place[:count]]}
            for place, count in places
        ]
    }


def _chat(token: Spelled, text: str) -> dict[str, Any]:
    return {"token": token.shown, "logprob": token.logprob, "bytes": [*text.encode()]}
