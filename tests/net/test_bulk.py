"""The sockets of `stream`: who gets in, what a full, a gone and a rude peer do."""

import time
from contextlib import closing

import pytest
import zmq
from live import wait_until

from tetri.net import NetError
from tetri.net.bulk import BulkLink, BulkServer, Waker, Watch, context
from tetri.wire.bulk import PIECE_BYTES, REQUEST_BYTES

HERE = "tcp://127.0.0.1:*"
PATIENCE_S = 10.0


class Ends:
    """A server and its links, polled as their threads would."""

    def __init__(self, key):
        self.context, self.key, self.waker = context(), key, Waker()
        self.server = BulkServer(self.context, HERE, key)
        self.watch = Watch(self.waker)
        self.watch.add(*self.server.watched)
        self.links = []

    def link(self, key=None, address=None):
        link = BulkLink(self.context, address or self.server.address, key or self.key)
        self.links.append(link)
        self.watch.add(link.socket, link.monitor)
        return link

    def drop(self, link):
        self.links.remove(link)
        self.watch.remove(link.socket, link.monitor)
        link.close()

    def until(self, condition):
        deadline = time.monotonic() + PATIENCE_S
        while not (found := condition()):
            assert time.monotonic() < deadline
            self.watch.wait(0.05)
            self.server.admit()
            for link in self.links:
                link.look()
        return found

    def up(self, link):
        self.until(lambda: link.up)
        return link

    def heard(self, link, message=b"hello"):
        """The server's name for a link."""
        self.until(lambda: link.send(message))
        return self.until(self.server.receive)

    def close(self):
        for link in self.links:
            link.close()
        self.server.close()
        self.context.term()
        self.waker.close()


def test_a_piece_arrives_in_memory_of_its_own(key):
    with closing(Ends(key)) as made:
        link = made.up(made.link())
        peer, message = made.heard(link)
        assert message == b"hello"
        source = memoryview(bytearray(range(256)) * 4096)
        assert made.server.send(peer, b"header", source) is True
        assert made.until(link.receive) == b"header" and link.more
        piece = link.receive_frame()
        assert piece == source and not link.more
        piece[5] ^= 1  # the receiver's, and nobody else's
        made.server.send(peer, b"next", source)
        made.until(link.receive)
        again = link.receive_frame()
        made.drop(link)
        assert again == source and bytes(piece[:7]) == bytes([0, 1, 2, 3, 4, 4, 6]), "it stays when the connection ends"


def test_what_waits_for_a_receiver_is_a_view_of_the_memory_itself(key):
    with closing(Ends(key)) as made:
        peer, _ = made.heard(made.up(made.link()))
        source = bytearray(PIECE_BYTES)
        view = memoryview(source)
        for _ in range(40):  # more than the kernel's buffers take
            made.server.send(peer, b"x", view[:])
        with pytest.raises(BufferError):
            source.clear()  # libzmq has it


def test_a_receiver_that_does_not_read_is_full_and_one_that_left_is_gone(key):
    with closing(Ends(key)) as made:
        link = made.up(made.link())
        peer, _ = made.heard(link)
        payload = bytes(PIECE_BYTES)
        sent = 0
        while made.server.send(peer, b"x", payload):
            sent += 1
            assert sent < 20_000
        assert made.server.send(peer, b"x", payload) is False
        made.drop(link)
        made.until(lambda: made.server.send(peer, b"x") is None)
        assert made.server.send(b"nobody", b"x") is None


def test_frames_over_the_limits_end_the_connection_and_more_frames_are_no_message(key):
    with closing(Ends(key)) as made:
        link = made.up(made.link())
        link.socket.send_multipart([b"a", b"b", b"c"])
        assert made.until(made.server.receive)[1] == b""
        peer, message = made.heard(link, b"x" * REQUEST_BYTES)
        assert len(message) == REQUEST_BYTES
        made.server.send(peer, b"h", bytes(PIECE_BYTES + 65))
        made.until(lambda: link.broken)
        second = made.up(made.link())
        second.send(b"x" * (REQUEST_BYTES + 65))
        made.until(lambda: second.broken)
        assert made.heard(made.up(made.link()))[1] == b"hello"


def test_nobody_there_is_no_error_and_a_break_is_seen_once_for_all(key):
    with closing(Ends(key)) as made:
        link = made.link(address="tcp://127.0.0.1:9")
        assert not link.send(b"x") and link.receive() is None
        link.look()
        assert not link.up and not link.broken
        good = made.up(made.link())
        assert good.drop() == 0
        made.server.close()
        wait_until(lambda: good.look() or good.broken, "the break is not seen")
        assert not good.up


def test_a_waker_wakes_from_any_number_of_rings_and_after_its_end_does_nothing():
    waker = Waker()
    watch = Watch(waker)
    assert watch.wait(0) == []
    for _ in range(3):
        waker.ring()
    assert watch.wait(None) == [waker.fd]
    waker.hush()
    assert watch.wait(0) == []
    waker.hush()
    waker.close()
    waker.ring()


def test_members_get_in(key):
    with closing(Ends(key)) as made:
        link = made.up(made.link())
        peer, message = made.heard(link, b"x" * REQUEST_BYTES)  # the longest there are
        assert len(message) == REQUEST_BYTES and made.server.refused == 0
        made.server.send(peer, b"header", bytes(PIECE_BYTES))
        assert made.until(link.receive) == b"header"
        assert link.receive_frame() == bytes(PIECE_BYTES)


def test_nobody_else_gets_in(key, other_key):
    other = other_key
    with closing(Ends(key)) as made:
        outsider = made.link(other)
        made.until(lambda: outsider.broken)  # each has another key than the other: neither talks
        assert not outsider.up
        # One who knows the server's public key, and has one of their own:
        knows, plain = made.context.socket(zmq.DEALER), made.context.socket(zmq.DEALER)
        knows.curve_serverkey, knows.curve_publickey, knows.curve_secretkey = key.public, other.public, other.secret
        try:
            for strange in (knows, plain):
                strange.linger = 0
                strange.connect(made.server.address)
                strange.send(b"let me in")
            made.until(lambda: made.server.refused > 0)
            assert made.heard(made.up(made.link()))[1] == b"hello"
            assert made.server.receive() is None
        finally:
            knows.close(0)
            plain.close(0)


def test_other_hosts_are_named_by_an_ipv4_address(key):
    with context() as made:
        with pytest.raises(NetError, match="IPv4 address"):
            BulkLink(made, "tcp://example.org:1", key)
        with pytest.raises(NetError, match="cannot bind"):
            BulkServer(made, "tcp://192.0.2.1:1", key)
        BulkLink(made, "tcp://192.0.2.1:1", key).close()
