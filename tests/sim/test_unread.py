"""Workers that read more slowly than the broker sends: what lies unread in an inbox is not sent again."""

from collections import Counter

import pytest

from tetri.cost import Cost
from tetri.sim import world
from tetri.sim.instance import PlainWorker
from tetri.sim.links import Port
from tetri.sim.setup import Setup
from tetri.sim.traces import Arrival

COUNT, STEP_S = 2000, 0.5
COST = Cost(prefill=((1.0, STEP_S), (512.0, STEP_S)), decode=((1.0, 0.02), (64.0, 0.03)), kv_token_bytes=1000)
SETUP = Setup(COST, prefill=2, decode=2, kv_tokens=64_000, chunk_tokens=4096, heartbeat_s=0.2)


class SlowReader(PlainWorker):
    """Reads so many messages between two steps, however many wait."""

    most = COUNT

    def turn(self):
        left, self.inbox = self.inbox[self.most :], self.inbox[: self.most]
        super().turn()
        self.inbox = left + self.inbox
        if self.inbox and self._plan is None:
            self.kernel.at(self.kernel.now, self._turn)


@pytest.mark.parametrize("most", [COUNT, 64])
def test_each_request_is_assigned_once_and_closed_once_by_whom_it_was(monkeypatch, most):
    """All at once, in steps of 0.5 s, with heartbeats every 0.2 s."""
    sent, send = Counter(), Port.send

    def counted(port, peer, message):
        sent[type(message).__name__] += 1
        send(port, peer, message)

    monkeypatch.setattr(Port, "send", counted)
    monkeypatch.setattr(SlowReader, "most", most)
    monkeypatch.setattr(world, "PlainWorker", SlowReader)
    result = world.World(SETUP, [Arrival(0.0, 300, 5)] * COUNT).run()
    assert all((outcome.state, outcome.attempts) == ("done", 1) for outcome in result.outcomes)
    # The prefill instance lets go when all KV has landed; both hear of the end.
    assert (sent["Assign"], sent["Close"]) == (COUNT, 3 * COUNT)
