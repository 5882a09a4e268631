"""The input of a classifier: the user's text, recovered from the prompt's token ids."""

from __future__ import annotations

import os.path
from collections.abc import Callable, Sequence

from tetri.request import Turn
from tetri.text import TextError, Tokenizer, decode

# Of a longer prompt, only this many tokens at each end are decoded: far more than any classifier reads.
END_TOKENS = 1024
PROBES = ("a", "b")  # two user messages without a common character


def reader(tokenizer: Tokenizer) -> Callable[[Sequence[int]], str]:
    """Return a function from a prompt's token ids to the user's text.

    The function removes what the chat template puts before and after the text, because a classifier is trained on
    plain texts. A prompt that does not match the template stays as it is."""
    head, tail = template_of(tokenizer)

    def read(prompt: Sequence[int]) -> str:
        if len(prompt) > 2 * END_TOKENS:
            prompt = [*prompt[:END_TOKENS], *prompt[-END_TOKENS:]]
        text = decode(tokenizer, prompt)
        return text.removeprefix(head).removesuffix(tail)

    return read


def template_of(tokenizer: Tokenizer) -> tuple[str, str]:
    """(text before, text after) a single user message in the chat template; both are "" if the model has no chat
    template that can be used, or its template refuses a single user message."""
    try:
        first, second = (decode(tokenizer, tokenizer.chat([Turn(role="user", content=text)])) for text in PROBES)
    except TextError:
        return "", ""
    head = os.path.commonprefix([first, second])
    tail = os.path.commonprefix([first[::-1], second[::-1]])[::-1]
    return head, tail
