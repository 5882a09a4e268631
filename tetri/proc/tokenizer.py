"""The tokenising process, a child of the broker: turns texts and conversations into token ids.

Tokenising a text and rendering a chat template keep Python's interpreter lock. In a process of its own this stops no
stream of the broker. The process ends when the broker's end of the connection closes, also when the broker was killed.
"""

from __future__ import annotations

import signal
import sys
from array import array
from multiprocessing.connection import Connection

import msgspec

from tetri.request import Turn
from tetri.text import ByteTokenizer, TextError, Tokenizer, load_tokenizer


class Question(msgspec.Struct, frozen=True, array_like=True):
    """A text to be tokenised: a prompt or a conversation."""

    prompt: str | None
    messages: list[Turn] | None


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """`ids`: the token ids as an array of 4-byte numbers; empty if there is a `problem`, one line for the client."""

    ids: bytes
    problem: str | None = None


_questions = msgspec.msgpack.Decoder(Question)
_encoder = msgspec.msgpack.Encoder()


def serve(tokenizer: Tokenizer, connection: Connection) -> None:
    """Send an empty answer, which says that the tokenizer is loaded; then answer questions until the connection
    closes."""
    answer = Answer(b"")
    try:
        while True:
            connection.send_bytes(_encoder.encode(answer))
            answer = _answered(tokenizer, _questions.decode(connection.recv_bytes()))
    except (EOFError, ConnectionError):
        return  # the broker has ended


def _answered(tokenizer: Tokenizer, asked: Question) -> Answer:
    try:
        ids = tokenizer.encode(asked.prompt) if asked.prompt is not None else tokenizer.chat(asked.messages or [])
    except TextError as error:
        return Answer(b"", str(error))
    return Answer(array("I", ids).tobytes())


def main(descriptor: str, folder: str, special_tokens_in_prompt: str) -> None:
    """Run the process. `descriptor`: of its connection; `folder`: of the checkpoint, "" for an emulated engine."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the broker
    connection = Connection(int(descriptor))
    try:
        specials = bool(special_tokens_in_prompt)
        tokenizer = load_tokenizer(folder, specials_in_prompt=specials) if folder else ByteTokenizer()
    except TextError as error:
        connection.send_bytes(_encoder.encode(Answer(b"", str(error))))
        return
    serve(tokenizer, connection)


if __name__ == "__main__":
    main(*sys.argv[1:])
