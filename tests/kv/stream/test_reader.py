"""A receiver of `stream` and servers that are slow or rude, or none."""

import threading

import pytest
from live import wait_until
from xxhash import xxh3_64_intdigest

from tests.kv.stream.world import big
from tetri.instance import Reach
from tetri.kv.base import KVForeign, KVLost, Wanted, joined
from tetri.kv.local import LocalSlab
from tetri.kv.stream.fetch import StreamPatience
from tetri.kv.stream.stream import StreamReader, StreamSettings
from tetri.net import keys
from tetri.net.bulk import BulkServer, context
from tetri.wire import codec
from tetri.wire.bulk import PIECE_BYTES, Alive, BulkRequest, Credit, Fetch, Gone, Piece
from tetri.wire.handover import Handle

MB = 1 << 20
QUICK = StreamPatience(stall_s=1.0, lost_s=3.0)  # long enough for a busy machine


class RudeServer:
    """Speaks the frames, and says to each Fetch what `answers` give: (header, payload) pairs, in a thread."""

    def __init__(self, answers, key):
        self.context, self.fetches, self.ending = context(), [], False
        self.server = BulkServer(self.context, "tcp://127.0.0.1:*", key)
        self.answers = answers
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        while not self.ending:
            self.server.admit()
            received = self.server.receive()
            if received is None:
                self.server.socket.poll(5)
                continue
            peer, frame = received
            message = codec.decode(frame, BulkRequest)
            if isinstance(message, Fetch):
                self.fetches.append(message)
                for header, payload in self.answers(message, len(self.fetches)):
                    data = header if isinstance(header, bytes) else codec.encode(header)
                    self.server.send(peer, data, payload)

    def close(self):
        self.ending = True
        self.thread.join(10)
        self.server.close()
        self.context.term()


def pieces(fetch, data, start=None):
    start = fetch.start if start is None else start
    while start < len(data):
        yield Piece(number=fetch.number, start=start), data[start : start + PIECE_BYTES]
        start += PIECE_BYTES


DATA = big(3, 2 * MB)
RUDE = {
    "garbage": lambda f: [(b"\xff\x00garbage", None)],
    "nothing": lambda f: [(b"", None)],
    "a request": lambda f: [(Credit(credit=5), None)],
    "no payload": lambda f: [(Piece(number=f.number, start=f.start), None)],
    "an empty payload": lambda f: [(Piece(number=f.number, start=f.start), b"")],
    "a payload too long": lambda f: [(Piece(number=f.number, start=f.start), DATA[:PIECE_BYTES] + b"x" * MB)],
    "a wrong place": lambda f: [(Piece(number=f.number, start=f.start + 7), DATA[:100])],
    "a truncated piece": lambda f: [*pieces(f, DATA[: f.start + 100]), *pieces(f, DATA, f.start + PIECE_BYTES)],
    "gone with a payload": lambda f: [(Gone(number=f.number, foreign=False, reason="x"), b"payload")],
}
HARMLESS = {
    "an older ticket": lambda f: [(Piece(number=f.number + 1000, start=0), DATA[:PIECE_BYTES])] * 20,
    "an unknown gone": lambda f: [(Gone(number=f.number + 1, foreign=True, reason="x"), None)],
    "a sign of life": lambda f: [(Alive(), None)],
    "surplus": lambda f: [*pieces(f, DATA), *pieces(f, DATA, 0), *pieces(f, DATA + bytes(MB), 2 * MB)],
}


class Reading:
    """A stream that reads from a server of the test."""

    def __init__(self, address, key, patience):
        self.woken, settings = threading.Event(), StreamSettings(key=key, patience=patience)
        self.stream = StreamReader(LocalSlab("d0", 1, 1, {}), settings, self.woken.set)
        self.meet(address)

    def meet(self, address):
        self.stream.meet("p", Reach(paths=["stream"], host="x", process=1, segment="s", address=address))

    def fetch(self, data, index=0, seconds=20.0):
        handle = Handle(segment="s", slots=[0], generations=[1], block_bytes=len(data))
        self.stream.fetch(Wanted(("r", index), "p", "stream", handle, xxh3_64_intdigest(data)))
        found = []

        def answered():
            found.extend((t.problem, [bytes(joined(b)) for b in t.blocks]) for t in self.stream.fetched())
            return found

        wait_until(answered, "no answer", seconds)
        assert len(found) == 1
        return found[0]


@pytest.fixture
def rude(tmp_path):
    made, path = [], str(tmp_path / "key")
    keys.generate(path)

    def make(answers, patience=QUICK):
        server = RudeServer(answers, keys.load(path))
        reading = Reading(server.server.address, path, patience)
        made.extend((reading.stream, server))
        return server, reading

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize("answer", RUDE.values(), ids=RUDE.keys())
def test_a_rude_answer_costs_a_connection_and_what_came_rightly_stays(rude, answer):
    server, reading = rude(lambda fetch, times: answer(fetch) if times == 1 else pieces(fetch, DATA))
    assert reading.fetch(DATA) == (None, [DATA])
    assert len(server.fetches) == 2 and reading.stream.counters["read_cut"] == 1


@pytest.mark.parametrize("answer", HARMLESS.values(), ids=HARMLESS.keys())
def test_what_nobody_asked_for_is_dropped_and_harms_nothing(rude, answer):
    server, reading = rude(lambda fetch, times: [*answer(fetch), *pieces(fetch, DATA)])
    assert reading.fetch(DATA) == (None, [DATA]) and reading.fetch(DATA, 1) == (None, [DATA])
    assert reading.stream.counters["read_cut"] == 0


def test_what_is_always_rude_silent_gone_or_no_address_is_lost_and_foreign_is_not(rude):
    for answers in ([(b"garbage", None)], []):
        _, reading = rude(lambda fetch, times, answers=answers: answers, StreamPatience(stall_s=0.1, lost_s=0.3))
        assert isinstance(reading.fetch(DATA)[0], KVLost)
    _, reading = rude(lambda f, times: [(Gone(number=f.number, foreign=times == 2, reason="why"), None)])
    first, second = reading.fetch(DATA)[0], reading.fetch(DATA, 1)[0]
    assert type(first) is KVLost and type(second) is KVForeign and "why" in str(first)
    for address in ("", "tcp://example.org:1", "x" * 300):
        reading.meet(address)
        problem, _ = reading.fetch(DATA)
        assert isinstance(problem, KVLost) and "address" in str(problem)
