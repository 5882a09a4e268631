"""A broker for tests of clients: a ROUTER socket in a thread, scripted by each test."""

import itertools
import threading
from math import inf

import msgpack
import zmq
from msgspec import to_builtins

from tetri.wire.load import Load
from tetri.wire.observation import Activity

WORDS = ["one ", "two ", "three"]


def pack(**body):
    return b"\x04" + msgpack.packb(body)


def done(rid="r1", reason="length", tokens=3, error=None, choice=0):
    return {
        "type": "done",
        "rid": rid,
        "reason": reason,
        "usage": {"prompt_tokens": 2, "completion_tokens": tokens},
        "timeline": {"queued": 0.1, "prefill": 0.2},
        "ttft_s": 0.2,
        "jct_s": 0.3,
        "receipt": {"prompt_tokens": 2, "adopted": 2, "chunks": 1},
        "error": error,
        "choice": choice,
    }


def delta(index, rid="r1", word=None, choice=0, token=None):
    text = WORDS[index] if word is None else word
    return {"type": "delta", "rid": rid, "start": index, "ids": [token or index + 10], "text": text, "choice": choice}


def accepted(message, rid="r1"):
    return {"type": "accepted", "key": message["key"], "rid": rid, "prompt_tokens": 2, "max_tokens": 3}


def answer(message):
    """A broker that does everything right."""
    if message["type"] == "submit":
        return [accepted(message), *map(delta, range(3)), done()]
    return []


def choices(message):
    """As `answer`, for `n` choices whose tokens and text name them; the last choice ends first."""
    if message["type"] != "submit":
        return []
    indexes = range(message.get("n", 1))
    deltas = [delta(i, word=f"{c}{WORDS[i]}", choice=c, token=100 * c + i) for i in range(3) for c in indexes]
    return [accepted(message), *deltas, *(done(choice=c) for c in reversed(indexes))]


def likely(index, top=2):
    """A token as it comes where log probabilities were asked for; all of `top` but itself are impossible."""
    logprob = -0.5 * (index + 1)
    return [index + 10, logprob, {index + 10 + more: -inf if more else logprob for more in range(top)}]


class FakeBroker:
    """`reply(message)` gives what to send back: maps, or bytes sent as they are. `seen` is what came."""

    def __init__(self, reply):
        self.reply, self.seen = reply, []
        self._socket = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.linger = 0
        self.address = f"tcp://127.0.0.1:{self._socket.bind_to_random_port('tcp://127.0.0.1')}"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self):
        while not self._stop.is_set():
            if not self._socket.poll(10):
                continue
            peer, frame = self._socket.recv_multipart()
            assert frame[:1] == b"\x04"
            message = msgpack.unpackb(frame[1:], strict_map_key=False)
            self.seen.append(message)
            for reply in self.reply(message):
                self._socket.send_multipart([peer, reply if isinstance(reply, bytes) else pack(**reply)])

    def types(self):
        return [message["type"] for message in self.seen]

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        self._socket.close()


class Scripted:
    """Call the next function of a list for every message of a type; the last one again and again."""

    def __init__(self, **scripts):
        self._scripts = {kind: itertools.chain(list(s), itertools.repeat(s[-1])) for kind, s in scripts.items()}

    def __call__(self, message):
        script = self._scripts.get(message["type"])
        return next(script)(message) if script else []


def endless(message):
    """Two tokens, then nothing until a Cancel."""
    if message["type"] == "submit":
        return [accepted(message), delta(0), delta(1)]
    if message["type"] == "cancel":
        return [done(reason="cancelled", tokens=2)]
    return [{"type": "delta", "rid": "r1", "start": 2, "ids": [], "text": ""}]


def instance(iid, role, **fields):
    """One instance in a Status, as the broker sends it."""
    plain = {"iid": iid, "role": role, "state": "ready", "incarnation": 1, "blocks": 9, "held": 3}
    plain |= {"load": to_builtins(Load(free_blocks=8, queued=1, running=2)), "activity": to_builtins(Activity())}
    plain |= {"note": "", "paths": {}, "counters": {}, "slots_used": 0, "predictor": None, "unread_by": {}, "keeps": ""}
    return {**plain, "step_ratio": {"prefill": None, "decode": None}, **fields}


STATUS = {"type": "status", "instances": [], "requests": {"decode": 1}, "counters": {}, "model": "m", "monitor": None}
STATUS |= {"notes": [], "slo": {"ttft_s": None, "tpot_s": None}, "slo_requests": {}}
