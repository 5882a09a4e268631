"""Virtual processes: the loop around a core."""

from types import SimpleNamespace

import pytest

from tests.sim.script import Script
from tetri.core.actions import Publish, Send
from tetri.sim.links import Port, Wiring
from tetri.sim.nodes import MonitorNode


@pytest.fixture
def monitor(kernel):
    core = Script()
    return core, MonitorNode(kernel, core, Port(Wiring(kernel, 0.0), "monitor"))


def test_what_arrives_at_one_moment_is_read_in_one_turn(kernel, monitor):
    core, node = monitor
    core.due = 1.0
    for event in ("a", "b"):
        kernel.at(1.0, node.receive, event)
    kernel.run()
    assert core.heard == [(1.0, "a"), (1.0, "b")] and core.ticks == [1.0]


def test_the_loop_wakes_at_the_cores_deadline(kernel, monitor):
    core, node = monitor
    core.due = 2.0
    node.start()
    kernel.at(1.0, node.receive, "early")
    kernel.run()
    assert core.heard == [(1.0, "early")] and core.ticks == [2.0]


def test_a_deadline_that_moved_is_kept_in_its_new_place(kernel, monitor):
    core, node = monitor
    core.due = 1.0
    node.start()
    core.due = 3.0
    kernel.run()
    assert core.ticks == [3.0]


def test_it_publishes_and_sends(kernel, monitor):
    core, node = monitor
    heard = []
    hearer = SimpleNamespace(name="x", receive=heard.append)
    node.port.wiring.processes |= {"x": hearer, "monitor": node}
    node.port.wiring.subscribers["monitor"] = [hearer]
    node.port.connect("x", "x")
    kernel.run()
    core.answers["go"] = [Publish("view"), Send("x", "wish")]
    node.receive("go")
    kernel.run()
    assert heard == ["view", "wish"]
