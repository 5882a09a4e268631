"""OpenAI's API as data: bodies of requests into what a client of the broker asks, its events into bodies of answers.
Knows neither HTTP nor sockets. The field names are those of vLLM's API server; docs/api.md lists them.

    asked = read_chat(body, models)  # or read_completion; raises ApiError
    reply = (Stream if asked.stream else Answer)(asked, id, created, token_text)
    for each event of each of asked.submits(), in any order:
        send(reply.delta(prompt_index, choice, tokens, text))
        # the last event of a choice; raises ApiError: then reply.fail
        send(reply.end(prompt_index, choice, reason, usage, tokens, text))
    send(reply.finish())
"""

from tetri.wire.openai.answer import Answer
from tetri.wire.openai.asked import Asked
from tetri.wire.openai.completions import read_chat, read_completion
from tetri.wire.openai.description import openapi
from tetri.wire.openai.errors import ApiError
from tetri.wire.openai.models import model_list, server_version
from tetri.wire.openai.reply import Reply
from tetri.wire.openai.stream import Stream
from tetri.wire.openai.tokens import Tokenize, detokenized, read_detokenize, read_tokenize, tokenized

__all__ = [
    "Answer",
    "ApiError",
    "Asked",
    "Reply",
    "Stream",
    "Tokenize",
    "detokenized",
    "model_list",
    "openapi",
    "read_chat",
    "read_completion",
    "read_detokenize",
    "read_tokenize",
    "server_version",
    "tokenized",
]
