"""What tests of answers share."""

import json

from tetri.request import TokenLogprob, Usage
from tetri.wire.openai import read_chat, read_completion

TEXTS = {1: b"a", 2: b"b ", 3: "é".encode()[:1], 4: "é".encode()[1:], 5: b"<end>"}
USAGE = Usage(prompt_tokens=7, completion_tokens=3)


def reply(kind, **body):
    """The reply of this kind to a body: to a conversation, unless it has a prompt."""
    read, bare = (
        (read_completion, {}) if "prompt" in body else (read_chat, {"messages": [{"role": "user", "content": "x"}]})
    )
    return kind(read(json.dumps({**bare, **body}).encode(), ["m"]), "id-1", 1700000000, TEXTS.__getitem__)


def likely(token, logprob, top):
    return TokenLogprob(token, logprob, top)
