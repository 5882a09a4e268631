"""A worker killed with SIGKILL: its peers must hear of it in milliseconds, not after missed beats."""

import signal
import subprocess
import sys
import time
from contextlib import contextmanager

from tests.net.hubs import hubs, ipc, some
from tetri.wire.events import Arrived, PeerDown, PeerUp
from tetri.wire.messages import Close, InboxMessage

WORKER = """
import sys
from tetri.net import Hub
from tetri.wire.messages import InboxMessage
hub = Hub()
hub.bind_inbox(sys.argv[1], InboxMessage)
print("bound", flush=True)
while True:
    hub.poll(None)
"""


@contextmanager
def worker(address):
    with subprocess.Popen([sys.executable, "-c", WORKER, address], stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout.readline() == b"bound\n"
            yield child
        finally:
            child.kill()


def test_kill_nine_is_heard_at_once_and_a_restart_too(run_folder):
    address = ipc(run_folder, "w")
    with hubs(1) as (broker,):
        broker.connect("w", address)
        with worker(address) as child:
            assert some(broker, 1) == [PeerUp("w")]
            assert broker.send("w", Close(rid="r", attempt=1))
            start = time.monotonic()
            child.send_signal(signal.SIGKILL)
            assert some(broker, 1) == [PeerDown("w")]
            assert time.monotonic() - start < 1.0  # milliseconds, on a machine that is not busy
            child.wait()
        assert broker.send("w", Close(rid="r", attempt=1)) is False
        with hubs(1) as (second,):
            second.bind_inbox(address, InboxMessage)  # the dead one's file is no owner
            assert some(broker, 1) == [PeerUp("w")]
            assert broker.send("w", Close(rid="s", attempt=2))
            assert some(second, 1) == [Arrived(Close(rid="s", attempt=2))]
