"""What simulated instances trace and count is what the receipts and the engines say."""

from collections import defaultdict
from dataclasses import replace

import pytest

from tests.sim.shapes import ONE
from tetri.sim.clients import Clients
from tetri.sim.nodes import BrokerNode
from tetri.sim.setup import Timeouts
from tetri.sim.traces import Arrival
from tetri.sim.world import World
from tetri.wire.clients import Done
from tetri.wire.messages import Heartbeat, Tokens

SETUP = replace(ONE, timeouts=Timeouts(), link_bytes_s=1e5, timelines=True)
MANY = [Arrival(0.002 * number, 5 + 4 * number % 27, 1 + number % 12, n=1 + number % 2) for number in range(24)]
ALONE = [replace(each, n=1) for each in MANY]
TIGHT = replace(SETUP, slots=30, reserve_share=1.0, kv_tokens=40, max_batch=7)


class Watched:
    """A simulation, with what its broker receives of it and what its clients are told."""

    def __init__(self, monkeypatch, setup, arrivals):
        self.events = defaultdict(list)  # request -> what happened to its choices, as it was reported
        self.receipts = defaultdict(list)  # request -> receipts of its choices
        self.steps = {}  # (instance, end) -> the step that wrote tokens
        monkeypatch.setattr(BrokerNode, "receive", _first(self.received, BrokerNode.receive))
        monkeypatch.setattr(Clients, "receive_reply", _first(self.answered, Clients.receive_reply))
        self.world = World(setup, arrivals)
        self.world.run()
        last = [worker.core.reporter.heartbeat().message for worker in self.world.workers.values()]
        self.activities = {each.iid: each.activity for each in last}
        for heartbeat in last:
            self.received(heartbeat)

    def received(self, event):
        if isinstance(event, Heartbeat):
            for each in event.traced:
                self.events[each.rid.partition(".")[0]].append(each)
        elif isinstance(event, Tokens) and event.step is not None:
            self.steps[event.iid, event.step.at] = event.step

    def answered(self, client, message):
        if isinstance(message, Done):
            self.receipts[client.decode()].append(message.receipt)

    def of(self, number, kind):
        return [event for event in self.events[str(number)] if event.kind == kind]


def _first(watch, method):
    """The method, after `watch` has seen what it is called with."""

    def watched(self, *what):
        watch(*what)
        return method(self, *what)

    return watched


USUAL = {"offered", "granted", "chunk", "export", "fetch"}


@pytest.fixture(
    params=[
        (SETUP, [Arrival(0.0, 30, 6)], USUAL),
        (replace(SETUP, prefill=2, decode=2), MANY, USUAL | {"deferred"}),
        (replace(SETUP, prefill=0, decode=0, mixed=1, slots=40, kv_tokens=400), MANY, USUAL),
        (TIGHT, ALONE, USUAL | {"deferred", "preempted", "recompute"}),
        (replace(TIGHT, stream_interval=5), ALONE, USUAL | {"deferred", "preempted", "recompute"}),
    ],
    ids=["one request", "two of each", "both phases on one", "preempted", "several passes in one go"],
)
def watched(request, monkeypatch):
    setup, arrivals, kinds = request.param
    found = Watched(monkeypatch, setup, arrivals)
    assert kinds <= {each.kind for events in found.events.values() for each in events}
    return found


def test_what_is_traced_of_a_request_is_what_its_receipts_say(watched):
    for number, outcome in enumerate(watched.world.clients.outcomes):
        prompt, receipts = outcome.arrival.prompt, watched.receipts[str(number)]
        assert len(receipts) == outcome.arrival.n and outcome.attempts == 1
        chunks = watched.of(number, "chunk")
        assert [token for each in chunks for token in range(each.first, each.last)] == [*range(prompt)]
        fetches, again = watched.of(number, "fetch"), watched.of(number, "recompute")
        assert sum(each.size for each in fetches) == sum(each.kv_bytes for each in receipts)
        assert len(fetches) == sum(each.chunks for each in receipts)
        assert sum(max(min(each.last, prompt) - each.first, 0) for each in again) == sum(r.recomputed for r in receipts)
        assert len(watched.of(number, "preempted")) == outcome.preempted
        assert len(watched.of(number, "granted")) == (outcome.arrival.output > 1)


def test_what_is_counted_is_what_the_engines_did(watched):
    for iid, worker in watched.world.workers.items():
        use, counted = worker.use, watched.activities[iid]
        assert (counted.steps, counted.decode_tokens) == (use.steps, use.decode_tokens)
        assert counted.chunk_tokens == use.prefill_tokens
        assert counted.step_s == pytest.approx(sum(use.busy_s.values()))
        assert counted.preempted == use.preempted and counted.events_left_out == 0
        assert counted.chunk_tokens <= counted.chunk_space <= counted.chunk_steps * watched.world.setup.chunk_tokens
        written = sum(step.batch * step.passes for (who, _), step in watched.steps.items() if who == iid)
        assert written == counted.decode_tokens or watched.world.setup.stream_interval > 1
    receipts = [each for choices in watched.receipts.values() for each in choices]
    received = [each for counted in watched.activities.values() for each in counted.received.values()]
    assert sum(each.bytes for each in received) == sum(each.kv_bytes for each in receipts)
    assert sum(each.chunks for each in received) == sum(each.chunks for each in receipts)
