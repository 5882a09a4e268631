"""The messages of workers that no Membership lists yet."""

from __future__ import annotations

from tetri.core.instance.peers import Peers
from tetri.wire.handover import Chunk, Drop, LengthUpdate, Offer

MOST_UNLISTED = 256  # beyond these, the oldest messages are dropped


class Unlisted:
    """Keeps messages until a Membership lists this incarnation of their sender. No answer could reach the sender, and
    it repeats a message only after a second."""

    def __init__(self, peers: Peers) -> None:
        self.peers = peers
        self._messages: list[Offer | LengthUpdate | Chunk | Drop] = []

    def keeps(self, message: Offer | LengthUpdate | Chunk | Drop) -> bool:
        """Whether the sender of a message is not listed. The message is kept then."""
        if self.peers.knows(message.src, message.incarnation):
            return False
        self._messages.append(message)
        del self._messages[:-MOST_UNLISTED]
        return True

    def release(self) -> list[Offer | LengthUpdate | Chunk | Drop]:
        """Return all messages, after a new Membership. Those whose senders are still not listed come again."""
        messages, self._messages = self._messages, []
        return messages
