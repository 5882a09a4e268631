"""The messages of one choice for its client, in little memory: they are kept until the request is forgotten."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right

from tetri.core.broker.logprobs import Logprobs
from tetri.request import Token
from tetri.wire.clients import Delta, Done


class Outbox:
    """Deltas, each of which continues the one before, and at last a Done. `sent` of these messages have been sent to
    the client.

    The text of all Deltas is one text. For each of them, `_ends` has the index in the output at which its tokens end,
    and `_cuts` the byte at which its text ends. The newest message is also kept as it is: it is mostly sent at once."""

    __slots__ = ("done", "sent", "_count", "_cuts", "_ends", "_index", "_newest", "_output", "_rid", "_text")

    def __init__(self, rid: str, index: int, output: array[int] | Logprobs) -> None:
        """`index`: of the choice. `output`: its tokens as the client gets them. Those in a Delta stay as they are."""
        self.done: Done | None = None
        self.sent = 0
        self._rid, self._index, self._output = rid, index, output
        self._ends, self._cuts, self._text = array("I"), array("I"), bytearray()
        self._newest: Delta | Done | None = None
        self._count = 0

    def add(self, start: int, ids: list[Token], text: str) -> int:
        """Append a Delta with the next tokens of the output, from index `start` on. Returns the bytes of all texts."""
        self._newest = Delta(rid=self._rid, start=start, ids=ids, text=text, choice=self._index)
        self._count += 1
        texts = self._text
        texts += text.encode()
        size = len(texts)
        self._ends.append(start + len(ids))
        self._cuts.append(size)
        return size

    def end(self, done: Done) -> None:
        """Append the Done."""
        self.done = self._newest = done
        self._count += 1

    @property
    def text_bytes(self) -> int:
        """Bytes of all texts."""
        return len(self._text)

    @property
    def tokens(self) -> int:
        """Number of output tokens in all Deltas."""
        return self._ends[-1] if self._ends else 0

    @property
    def unsent(self) -> int:
        """Number of messages that have not been sent to the client."""
        return self._count - self.sent

    @property
    def tokens_sent(self) -> int:
        """Number of output tokens in the messages that were sent to the client of an open choice."""
        return self._ends[self.sent - 1] if 0 < self.sent <= len(self._ends) else 0

    def send_next(self, most: int) -> list[Delta | Done]:
        """The next messages to send, at most `most`; they count as sent."""
        start = self.sent
        if start + 1 == self._count and most and self._newest is not None:  # the usual case, fast
            self.sent = self._count
            return [self._newest]
        self.sent = min(start + most, self._count)
        return [self._message(index) for index in range(start, self.sent)]

    def send_from(self, start: int) -> None:
        """The messages that a client with `start` tokens lacks are unsent, all others count as sent. A Delta that ends
        after `start` is sent whole, since its text cannot be split by tokens. One without tokens is always sent: the
        token count does not tell whether the client has its text."""
        self.sent = bisect_right(self._ends, start)
        while self.sent and self._start(self.sent - 1) == self._ends[self.sent - 1]:
            self.sent -= 1

    def unsend(self, message: Delta | Done) -> bool:
        """A message did not arrive: it and those after it are unsent again. False for one that is not in the outbox,
        such as an empty Delta. Finds it by its start: a client that does not read has thousands in its outbox."""
        index = len(self._ends)
        if isinstance(message, Delta):
            if not (message.ids or message.text):
                return False
            index = bisect_left(self._ends, message.start) + 1 if message.start else 0
        if index >= self._count or self._message(index) != message:
            return False
        self.sent = min(self.sent, index)
        return True

    def _start(self, index: int) -> int:
        """The index in the output at which the tokens of a Delta begin."""
        return self._ends[index - 1] if index else 0

    def _message(self, index: int) -> Delta | Done:
        if index == self._count - 1:
            assert self._newest is not None
            return self._newest
        start, text_from = (self._ends[index - 1], self._cuts[index - 1]) if index else (0, 0)
        ids: list[Token] = [*self._output[start : self._ends[index]]]
        text = self._text[text_from : self._cuts[index]].decode()
        return Delta(rid=self._rid, start=start, ids=ids, text=text, choice=self._index)
