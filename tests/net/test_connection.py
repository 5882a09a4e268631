"""A connecting socket: what its monitor reports, and what can be sent when."""

import pytest
import zmq

from tests.net.hubs import until
from tetri.net import NetError, sockets
from tetri.net.connection import Connection

UP, DOWN = zmq.EVENT_HANDSHAKE_SUCCEEDED, zmq.EVENT_DISCONNECTED


def reported(made):
    """The next event."""
    found = []
    until(lambda: found.extend(made.reported()) or found)
    return found


def test_a_connection_reports_its_peer_and_sends_while_it_is_there(context):
    peer = context.socket(zmq.PULL)
    port = peer.bind_to_random_port("tcp://127.0.0.1")
    made = Connection(context, sockets.outbox(context), f"tcp://127.0.0.1:{port}", UP | DOWN)
    assert reported(made) == [UP]
    assert made.send(b"hello") and peer.recv() == b"hello"
    peer.close(0)
    assert reported(made) == [DOWN]
    made.close()


def test_nothing_is_queued_for_a_peer_that_is_not_there(context, run_folder):
    made = Connection(context, sockets.outbox(context), f"ipc://{run_folder}/nobody", UP)
    assert not made.send(b"hello") and list(made.reported()) == []
    made.close()


def test_what_is_no_address_is_said(context):
    with pytest.raises(NetError, match="cannot connect"):
        Connection(context, sockets.outbox(context), "nonsense", UP)
