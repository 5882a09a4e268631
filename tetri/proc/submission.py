"""What the broker's process adds to a Submit for its core: a digest of what is asked for, and a request id."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from hashlib import blake2b

import msgspec

from tetri.core.actions import Submitted
from tetri.wire.clients import Submit

BYTES = 16  # of a digest and of a request id: 128 bits, so that no two are equal and nobody guesses one


def submitted(
    client: bytes, message: Submit, digest: bytes, prompt: Sequence[int] = (), waited_s: float = 0.0
) -> Submitted:
    """The event of a Submit whose prompt has these token ids. Each gets its own id: a repetition does not use it.
    `digest`: of its `content`. `waited_s`: for how many seconds its text has waited to be tokenised."""
    rid, asked = secrets.token_hex(BYTES), (message.sampling, message.deadline_s)
    own = (client, message.key, message.secret, digest, rid, tuple(prompt), *asked)
    return Submitted(*own, waited_s, message.n, message.default_tokens, message.slo)


def content(message: Submit) -> bytes:
    """A digest of all that a Submit asks for. Equal for equal messages: a default counts as if it were given."""
    number = (message.n, message.default_tokens, message.slo)
    asked = (message.prompt, message.messages, message.sampling, message.deadline_s, *number)
    return blake2b(msgspec.msgpack.encode(asked), digest_size=BYTES).digest()
