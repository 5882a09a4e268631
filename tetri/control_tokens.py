"""Keeps text of users from becoming control tokens, such as those that separate the turns of a conversation.

A tokenizer makes one token of each special token's text, wherever it finds it. In text of a user it must not: control
tokens are replaced by marks before a chat template is rendered, and encoded as ordinary text at these marks. All other
text is encoded as it stands, so that the tokens are the usual ones where a template's text touches a user's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

# A mark is two halves of surrogate pairs. No valid text contains a half, so no text can contain a mark.
_HIGH, _LOW, _BASE = 0xD800, 0xDC00, 1024
_MARK = re.compile("([\ud800-\udbff][\udc00-\udfff])")


class ControlTokens:
    """The control tokens of a tokenizer of the tokenizers package. `tokens`: the id of each, by its text."""

    def __init__(self, inner: Any, tokens: Mapping[str, int]) -> None:
        self.tokens = tokens
        self._inner = inner
        self._ids = frozenset(tokens.values())
        self._pattern = _any_of(tokens)
        self._firsts = _any_of({text[0] for text in tokens})
        texts = dict.fromkeys([*tokens, *(text[0] for text in tokens)])
        self._marks = {text: chr(_HIGH + at // _BASE) + chr(_LOW + at % _BASE) for at, text in enumerate(texts)}
        self._spelled = {mark: _spelled(inner, text) for text, mark in self._marks.items()}

    def hidden(self, text: str) -> str:
        """The text with a mark in place of each control token."""
        return self._pattern.sub(self._mark, text)

    def broken(self, text: str) -> str:
        """The text with a mark in place of each character that begins a control token: none is left, and none arises
        where this text is cut, changed or joined to other text."""
        return self._firsts.sub(self._mark, text)

    def _mark(self, found: re.Match[str]) -> str:
        return self._marks[found[0]]

    def may_begin(self, text: str) -> bool:
        """Whether the text has a character that begins a control token."""
        return self._firsts.search(text) is not None

    def named(self, text: str) -> list[int]:
        """The control tokens in a text, in order."""
        return [self.tokens[name] for name in self._pattern.findall(text)]

    def among(self, ids: Iterable[int]) -> list[int]:
        """The control tokens among token ids, in order."""
        return [i for i in ids if i in self._ids]

    def encode(self, text: str, check: Callable[[str], object]) -> list[int]:
        """The ids of a text with marks. `check` is called for each part between two marks, and may raise."""
        ids: list[int] = []
        for place, part in enumerate(_MARK.split(text)):
            if place % 2:
                ids += self._spelled[part]
            elif part:
                check(part)
                ids += self._inner.encode(part, add_special_tokens=False).ids
        return ids


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches any of these texts, the longest one where several begin; none of them: matches nothing."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def _spelled(inner: Any, text: str) -> list[int]:
    """The ids of a text, none of which stands for a whole control token: the tokenizer without its added tokens."""
    normal = text if inner.normalizer is None else inner.normalizer.normalize_str(text)
    split = inner.pre_tokenizer
    pieces = [normal] if split is None else [piece for piece, _ in split.pre_tokenize_str(normal)]
    return [token.id for piece in pieces for token in inner.model.tokenize(piece)]
