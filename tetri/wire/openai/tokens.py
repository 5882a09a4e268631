"""Bodies of `/tokenize` and `/detokenize`."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import Struct

from tetri.request import Turn
from tetri.wire.openai.bodies import DetokenizeBody, TokenizeBody, model_named, read
from tetri.wire.openai.errors import ApiError
from tetri.wire.openai.turns import turns_of


class Tokenize(Struct, frozen=True, kw_only=True):
    """A text, or a conversation, to tokenize. `specials`: with the tokens that the model expects before a prompt;
    `texts`: the answer has the texts of the tokens."""

    prompt: str | None
    turns: list[Turn] | None
    specials: bool
    texts: bool


def read_tokenize(body: bytes, models: Sequence[str]) -> Tokenize:
    """The body of `/tokenize`. Raises ApiError."""
    fields, _ = read(body, TokenizeBody)
    model_named(fields.model, models)
    if (fields.prompt is None) == (fields.messages is None):
        raise ApiError(400, "send either prompt or messages", param="prompt")
    turns = None if fields.messages is None else turns_of(fields.messages)
    if turns is not None and fields.add_special_tokens:  # the chat template has them
        raise ApiError(
            400, "add_special_tokens is not supported with messages: leave it out", param="add_special_tokens"
        )
    specials = fields.add_special_tokens is not False
    return Tokenize(prompt=fields.prompt, turns=turns, specials=specials, texts=fields.return_token_strs)


def tokenized(ids: Sequence[int], max_model_len: int | None, texts: Sequence[str] | None = None) -> bytes:
    """The body of the answer."""
    answer = {"count": len(ids), "max_model_len": max_model_len, "tokens": ids, "token_strs": texts}
    return msgspec.json.encode(answer)


def read_detokenize(body: bytes, models: Sequence[str]) -> list[int]:
    """The token ids in the body of `/detokenize`. Raises ApiError."""
    fields, _ = read(body, DetokenizeBody)
    model_named(fields.model, models)
    return fields.tokens


def detokenized(text: str) -> bytes:
    """The body of the answer."""
    return msgspec.json.encode({"prompt": text})
