"""Each message of one request in turn is the last of its sender, or is lost. The receipt is a worker's all the same."""

from dataclasses import replace
from functools import partial
from itertools import count

import pytest

from tests.sim.shapes import ONE
from tetri.request import Sampling
from tetri.sim.faulty.chance import Faults
from tetri.sim.faulty.world import FaultyWorld
from tetri.sim.traces import Arrival
from tetri.wire.messages import Heartbeat, Ready

PROMPT = 14  # tokens
SHAPES = {
    "two": ONE,
    "two, three tokens a message": replace(ONE, stream_interval=3),
    "one that does both": replace(ONE, prefill=0, decode=0, auto=1),
}
ENDS = {  # how it samples; why it ends, after how many tokens
    "length": (Sampling(max_tokens=4, ignore_eos=True), ("length", 4)),
    "stop": (Sampling(max_tokens=9), ("stop", 4)),
    "first token": (Sampling(max_tokens=1), ("length", 1)),
}


class Story(FaultyWorld):
    """One request in a deployment where all goes well until the message number `at` that a worker sends of it. `fault`
    says what then happens to the message and to its sender."""

    def __init__(self, setup, sampling, at=None, fault=""):
        self.at, self.fault, self.sent, self.mute = at, fault, 0, None
        arrival = Arrival(0.0, PROMPT, sampling.max_tokens, sampling=sampling)
        super().__init__(setup, [arrival], Faults(until=0.0))
        for worker in self.workers.values():
            worker.port.send = partial(self.pass_on, worker, worker.port.send)

    def pass_on(self, worker, deliver, peer, message):
        if worker is self.mute:
            return  # its loop has still to carry out what the core said: nothing of that leaves
        of_request = not isinstance(message, Heartbeat | Ready)
        now = of_request and self.sent == self.at
        self.sent += of_request
        if not (now and self.fault in ("lost", "lost with its sender")):
            deliver(peer, message)
        if now and self.fault != "lost":
            self.mute = worker
            self.kernel.at(self.kernel.now, self.die, worker)

    def die(self, worker):
        self.mute = None
        worker.kill(self.chance)
        self.kernel.at(self.kernel.now + 0.1, self._restart, worker)

    def tell(self):
        """How the request ended. Its tokens, and that its receipt is a worker's, are checked."""
        self.run()
        (client,) = self.clients.clients
        return client.done


def plain(setup, sampling, end):
    """A story without a fault that ends like this, under the first seed with a prompt that has it so."""
    for seed in count():
        story = Story(replace(setup, seed=seed), sampling)
        done = story.tell()
        if (done.reason, done.usage.completion_tokens) == end:
            return story, done


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_whatever_message_is_the_last_of_its_sender_the_receipt_is_true(shape, end):
    sampling, ending = ENDS[end]
    without, done = plain(SHAPES[shape], sampling, ending)
    assert done.receipt.attempts == 1 and without.sent >= 2
    attempts = {}
    for fault in ("lost", "lost with its sender", "the last of its sender"):
        ends = [Story(without.setup, sampling, at, fault).tell() for at in range(without.sent)]
        assert {(done.reason, done.usage.completion_tokens) for done in ends} == {ending}
        attempts[fault] = [done.receipt.attempts for done in ends]
    assert set(attempts["lost"]) == {1}  # all of it is sent again
    assert attempts["the last of its sender"][-1] == 1 < attempts["lost with its sender"][-1]  # the end itself
