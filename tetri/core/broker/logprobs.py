"""The log probabilities of one choice's output, in little memory: they are kept until the request is forgotten."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from tetri.request import Token, TokenLogprob


class Logprobs:
    """The output of a choice with its log probabilities: a slice of it is a list of TokenLogprobs, equal to those that
    were added.

    The ids are in the choice's output. For each token, `_ends` has the index at which its most likely tokens end."""

    __slots__ = ("_ends", "_ids", "_logprobs", "_top_ids", "_top_logprobs")

    def __init__(self, ids: array[int]) -> None:
        """`ids`: the choice's output."""
        self._ids = ids
        self._logprobs, self._ends = array("d"), array("I")
        self._top_ids, self._top_logprobs = array("I"), array("d")

    def add(self, tokens: Iterable[TokenLogprob]) -> None:
        """Append the log probabilities of the next tokens, whose ids are in the output already."""
        for token in tokens:
            self._logprobs.append(token.logprob)
            self._top_ids.extend(token.top)
            self._top_logprobs.extend(token.top.values())
            self._ends.append(len(self._top_ids))

    def cut(self, tokens: int) -> None:
        """Keep only the first so many tokens."""
        del self._logprobs[tokens:], self._ends[tokens:]
        last = self._start(len(self._ends))
        del self._top_ids[last:], self._top_logprobs[last:]

    def __getitem__(self, part: slice) -> list[Token]:
        return [self._token(index) for index in range(*part.indices(len(self._ends)))]

    def _token(self, index: int) -> TokenLogprob:
        top = slice(self._start(index), self._ends[index])
        likely = dict(zip(self._top_ids[top], self._top_logprobs[top], strict=True))
        return TokenLogprob(self._ids[index], self._logprobs[index], likely)

    def _start(self, index: int) -> int:
        """Where the most likely tokens at an index of the output begin."""
        return self._ends[index - 1] if index else 0
