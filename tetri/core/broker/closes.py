"""The Closes that workers may not have read yet."""

from __future__ import annotations

from tetri.core.actions import Send
from tetri.core.broker.membership import Members
from tetri.wire.messages import Close, Hold


class Closes:
    """Sends Closes and repeats the lost ones. A heartbeat lists a closed request until its worker has read the Close,
    which may take a long step: the Close is repeated only when a Membership that was sent after it has been read."""

    def __init__(self, members: Members) -> None:
        self.members = members
        self._sent: dict[str, dict[str, tuple[int, int]]] = {}  # iid -> rid -> (attempt, serial), oldest first

    def send(self, iid: str, close: Close) -> Send:
        """Close a request on a worker."""
        if iid in self.members.up:
            sent = self._sent.setdefault(iid, {})
            sent.pop(close.rid, None)
            sent[close.rid] = close.attempt, self.members.serial
        return Send(iid, close)

    def repeat(self, iid: str, hold: Hold) -> list[Send]:
        """Close a request that a heartbeat still lists, unless the Close may be on its way."""
        attempt, _ = self._sent.get(iid, _NONE).get(hold.rid, (0, 0))
        return [self.send(iid, Close(rid=hold.rid, attempt=hold.attempt))] if attempt < hold.attempt else []

    def read(self, iid: str, serial: int) -> None:
        """Forget the Closes before Membership `serial`: the worker has read them, or they are lost."""
        sent = self._sent.get(iid, _NONE)
        old = []
        for rid, (_, at) in sent.items():
            if at >= serial:
                break
            old.append(rid)
        for rid in old:
            del sent[rid]

    def forget(self, iid: str) -> None:
        """Forget all Closes of a worker that is lost: they may be lost with its connection."""
        self._sent.pop(iid, None)


_NONE: dict[str, tuple[int, int]] = {}
