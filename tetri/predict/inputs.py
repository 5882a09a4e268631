"""What a classifier reads of a request: the user's own text, back out of the prompt's token ids."""

from __future__ import annotations

import os.path
from collections.abc import Callable, Sequence

from tetri.request import Turn
from tetri.text import TextError, Tokenizer, decode

#: Of a longer prompt only so many tokens at either end become text: far more than any classifier's cut leaves.
END_TOKENS = 1024
PROBES = ("a", "b")  # two users' texts that have no character in common


def reader(tokenizer: Tokenizer) -> Callable[[Sequence[int]], str]:
    """From a prompt's ids to its text, without what the chat template puts in front of every conversation and behind
    it, since a classifier is trained on the texts alone. A prompt without a template, or with the user's own beginning
    of a conversation, stays as it is."""
    head, tail = template_of(tokenizer)

    def read(prompt: Sequence[int]) -> str:
        if len(prompt) > 2 * END_TOKENS:
            prompt = [*prompt[:END_TOKENS], *prompt[-END_TOKENS:]]
        text = decode(tokenizer, prompt)
        return text.removeprefix(head).removesuffix(tail)

    return read


def template_of(tokenizer: Tokenizer) -> tuple[str, str]:
    """The text in front of a user's first message and behind it; both empty where the model has no chat template, or
    one that refuses a user's message alone."""
    try:
        first, second = (decode(tokenizer, tokenizer.chat([Turn(role="user", content=text)])) for text in PROBES)
    except TextError:
        return "", ""
    head = os.path.commonprefix([first, second])
    tail = os.path.commonprefix([first[::-1], second[::-1]])[::-1]
    return head, tail
