"""Virtual links: latency, lost messages, and the request-level transfer of the paper."""

from tetri.sim.links import Port, Wiring
from tetri.wire.events import PeerUp
from tetri.wire.handover import Chunk, Drop, Handle


class Process:
    """Writes down what arrives and when."""

    def __init__(self, kernel, wiring, name):
        self.kernel, self.name, self.heard = kernel, name, []
        self.port = Port(wiring, name)
        wiring.processes[name] = self

    def receive(self, event):
        self.heard.append((self.kernel.now, event))


def pair(kernel, whole=False):
    """Two processes, of which the first is connecting to the second."""
    wiring = Wiring(kernel, 0.25, whole)
    made = Process(kernel, wiring, "a"), Process(kernel, wiring, "b")
    made[0].port.connect("b", "b")
    return made


def test_a_message_takes_the_latency_and_is_lost_while_no_connection_stands(kernel):
    a, b = pair(kernel)
    a.port.send("b", "lost")
    kernel.run()
    a.port.send("b", "heard")
    kernel.run()
    assert a.heard == [(0.25, PeerUp("b"))]
    assert b.heard == [(0.5, "heard")]
    a.port.disconnect("b")
    a.port.send("b", "lost")
    kernel.run()
    assert len(b.heard) == 1


def test_a_second_connect_changes_nothing_and_one_that_was_taken_back_never_stands(kernel):
    a, _ = pair(kernel)
    a.port.connect("b", "b")
    kernel.run()
    assert a.heard == [(0.25, PeerUp("b"))]
    a.port.disconnect("b")
    a.port.connect("b", "b")
    a.port.disconnect("b")
    kernel.run()
    assert len(a.heard) == 1


def chunk(index, tokens=(), offer=1):
    handle = Handle(segment="a", slots=[0], generations=[0], block_bytes=1)
    where = {"index": index, "start": index, "stop": index + 1, "handle": handle, "digest": 0, "tokens": [*tokens]}
    return Chunk(src="a", incarnation=1, rid="r", attempt=1, offer=offer, **where)


DROP = Drop(src="a", incarnation=1, rid="r", attempt=1, offer=1, why="")


def test_request_level_transfer_keeps_the_chunks_until_the_last_one_is_there(kernel):
    a, b = pair(kernel, whole=True)
    kernel.run()
    a.port.send("b", chunk(0))
    a.port.send("b", chunk(0))  # said again
    a.port.send("b", "another message")
    kernel.run()
    assert [message for _, message in b.heard] == ["another message"]
    a.port.send("b", chunk(1, tokens=[7]))
    kernel.run()
    assert [message for _, message in b.heard[1:]] == [chunk(0), chunk(1, tokens=[7])]


def test_request_level_transfer_forgets_the_chunks_of_an_offer_that_is_taken_back(kernel):
    a, b = pair(kernel, whole=True)
    kernel.run()
    for message in (chunk(0), DROP, chunk(0, offer=2), chunk(1, tokens=[7])):
        a.port.send("b", message)
    kernel.run()
    assert [message for _, message in b.heard] == [DROP, chunk(1, tokens=[7])]
