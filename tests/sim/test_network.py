"""Connections under faults, and processes that stand still."""

from types import SimpleNamespace

import pytest

from tests.sim.script import Script
from tetri.sim.faulty.chance import Chance, Faults, parse_faults
from tetri.sim.faulty.network import FaultyPort, FaultyWiring
from tetri.sim.faulty.processes import FaultyMonitor
from tetri.sim.kernel import Kernel
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.messages import Resend


def pair(faults):
    kernel = Kernel()
    chance = Chance(kernel, faults, 1)
    wiring = FaultyWiring(chance, 0.001, whole=False)
    for name in ("a", "b"):
        port = FaultyPort(wiring, name)
        port.process = wiring.processes[name] = FaultyMonitor(kernel, Script(), port)
    wiring.processes["a"].port.connect("b", "b")
    kernel.run()
    return SimpleNamespace(kernel=kernel, chance=chance, wiring=wiring, **wiring.processes)


def resend(number):
    return Resend(rid="r", attempt=1, start=number)


def sent_through(faults, count=50):
    """What of so many messages arrives."""
    world = pair(faults)
    for number in range(count):
        world.a.port.send("b", resend(number))
    world.kernel.run()
    return world, [event.start for _, event in world.b.core.heard]


def test_what_is_dropped_and_what_comes_twice_is_counted():
    world, heard = sent_through(Faults(drop=0.3))
    assert len(heard) == 50 - world.chance.counts["drop"] < 50 and heard == sorted(heard)
    world, heard = sent_through(Faults(duplicate=0.3))
    assert len(heard) == 50 + world.chance.counts["duplicate"] > 50 and {*heard} == {*range(50)}


def test_after_the_end_of_the_faults_all_arrives_in_order():
    world, heard = sent_through(Faults(drop=1.0, until=0.0))
    assert heard == [*range(50)] and not any(world.chance.counts.values())


def test_a_delay_is_up_to_the_longest():
    world, _ = sent_through(Faults(delay=1.0, longest=3.0), count=20)
    assert 0.1 < world.kernel.now <= 3.1


def test_what_is_on_its_way_is_lost_when_the_connection_breaks_which_is_made_again():
    world = pair(Faults())
    world.a.port.send("b", resend(1))
    (line,) = world.wiring.connections()
    line.break_off()
    world.a.port.send("b", resend(2))
    world.kernel.run()
    assert [event for _, event in world.a.core.heard] == [PeerUp("b"), PeerDown("b"), PeerUp("b")]
    world.a.port.send("b", resend(3))
    world.kernel.run()
    assert [event.start for _, event in world.b.core.heard] == [3]


def test_a_process_that_stands_still_reads_its_inbox_when_it_goes_on():
    world = pair(Faults(down=2.0))
    start = world.kernel.now
    world.b.freeze(world.chance)
    for number in range(3):
        world.a.port.send("b", resend(number))
    world.kernel.run()
    assert [event.start for _, event in world.b.core.heard] == [0, 1, 2]
    times = {now for now, _ in world.b.core.heard}
    assert times == {world.b.now} and world.kernel.now > start + 0.01 and world.b.now < start + 0.01


def test_nothing_reaches_a_process_that_was_killed():
    world = pair(Faults())
    world.a.port.send("b", resend(1))
    world.b.kill(world.chance)
    world.kernel.run()
    assert world.b.core.heard == []
    assert [event for _, event in world.a.core.heard] == [PeerUp("b"), PeerDown("b")]


def test_faults_are_read_from_names_and_numbers():
    assert parse_faults(" drop = 0.01 ,kill=0.001,down=3") == Faults(drop=0.01, kill=0.001, down=3.0)
    with pytest.raises(ValueError, match="nothing would go wrong"):
        parse_faults("drop=0.1,until=0")
