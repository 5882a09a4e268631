"""Who wrote which token of an answer. A salted emulated engine mixes a number of its own into its tokens, so the tokens
of two engines differ, and a token that was computed after other tokens than the answer has fits no engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import xxhash

from tetri.engine.emulated import next_token, roll
from tetri.request import Sampling


def salt_of(iid: str) -> int:
    """The salt of an instance, with emulated.salt."""
    return xxhash.xxh3_64_intdigest(iid.encode())


def writers(
    prompt: Sequence[int],
    output: Sequence[int],
    sampling: Sampling,
    vocabulary: int,
    token_bytes: int,
    salts: Mapping[str, int],
) -> list[set[str]]:
    """For each output token the names in `salts` whose salt gives it after the prompt and the tokens before it. Chance
    adds another name, or one where none belongs, to 1 in `vocabulary` tokens for each salt."""
    kv, state, found = bytearray(), bytes(8), list[set[str]]()
    for position, token in enumerate((*prompt, *output)):
        if position >= len(prompt):
            before = bytes(kv), position, position - len(prompt), sampling, vocabulary
            found.append({name for name, salt in salts.items() if next_token(*before, salt) == token})
        state = roll(state, token)
        kv += state * (token_bytes // 8)
    return found


def attempts_of(found: Sequence[set[str]]) -> int | None:
    """The least number of attempts that can have written an answer with these `writers`: in each, one instance wrote
    the first token, and one all others. None if a token has no writer."""
    attempts, others = 0, set[str]()
    for index, names in enumerate(found):
        if not names:
            return None
        first = index and not others  # whether the token before was the first of an attempt
        others = names if first else others & names
        attempts += not others
    return attempts
