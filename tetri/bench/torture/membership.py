"""What it takes to tell hundreds of workers of each other."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tetri.bench.torture import played
from tetri.bench.torture.case import Findings
from tetri.core.actions import Action, Send
from tetri.wire.codec import encode
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.messages import Membership

WORKERS, START_S, TURN_S = 256, 2.0, 0.005
#: Messages when every change goes to every worker at once, and whole; that were 4 GiB. A hundredth of it is allowed.
WHOLE_EACH_TIME, MOST_MIB = WORKERS**2, 40


class Sent:
    """The Memberships among actions. The network encodes a message once for all its receivers in a row."""

    def __init__(self) -> None:
        self.messages = self.encoded = self.bytes = 0
        self._last: tuple[Membership | None, int] = (None, 0)

    def count(self, actions: Iterable[Action]) -> None:
        """Add those of one turn."""
        for action in actions:
            if isinstance(action, Send) and isinstance(action.message, Membership):
                if action.message is not self._last[0]:
                    self._last = action.message, len(encode(action.message))
                    self.encoded += 1
                self.messages += 1
                self.bytes += self._last[1]


def membership(folder: Path, found: Findings) -> None:
    """256 workers start within two seconds, then half of them are lost at once. The broker's core, in virtual time."""
    broker, now = played.broker(), 0.0
    start, loss = Sent(), Sent()
    pending = [played.ready(f"w{number}", ("prefill", "decode")[number % 2]) for number in range(WORKERS)]
    while now < START_S + 1.0:
        now += TURN_S
        while pending and len(pending) * START_S / WORKERS > START_S - now:
            ready = pending.pop()
            start.count(broker.handle(ready, now))
            start.count(broker.handle(PeerUp(ready.instance.iid), now))
        start.count(broker.tick(now))
    for number in range(WORKERS // 2):
        loss.count(broker.handle(PeerDown(f"w{number}"), now))
    for _ in range(20):
        now += TURN_S
        loss.count(broker.tick(now))
    found.at_most("start_messages", start.messages, WHOLE_EACH_TIME // 8)
    found.at_most("start_encoded", start.encoded, 2 * WORKERS)
    found.at_most("start_mib", round(start.bytes / 2**20, 1), MOST_MIB)
    found.at_most("loss_messages", loss.messages, WORKERS)
    found.at_most("loss_encoded", loss.encoded, 2)
