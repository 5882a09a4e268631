"""Each attempt is written by one prefill and one decode engine request, whatever is lost, repeated or broken. The
engines are salted, so a token of another one cannot pass for the right one. TETRI_SEEDS and TETRI_FIRST_SEED as in
test_faulty.py."""

import os
from dataclasses import dataclass, field, replace
from functools import partial

import pytest

from tests.sim.shapes import ONE, WildPredictor, some_faults, some_shape
from tetri.core.actions import BROKER
from tetri.engine.salted import writers
from tetri.request import Sampling
from tetri.sim.faulty.chance import Faults
from tetri.sim.faulty.clients import Client
from tetri.sim.faulty.processes import TOKEN_BYTES, VOCABULARY
from tetri.sim.faulty.world import FaultyWorld
from tetri.sim.traces import Arrival
from tetri.wire.handover import Landed
from tetri.wire.messages import Heartbeat, Ready

SEEDS = int(os.environ.get("TETRI_SEEDS", "16"))
FIRST = int(os.environ.get("TETRI_FIRST_SEED", "0"))
# Each was wrong once: two decode instances wrote in turn (8), or a request was prefilled twice in one attempt.
ONCE_WRONG = (8, 28, 103, 106, 109, 171, 189)


@dataclass(frozen=True)
class Run:
    """One engine request of one process."""

    phase: str  # p or d
    attempt: int
    salt: int


@dataclass
class SaltedClient(Client):
    """`runs`: those of all requests, by rid."""

    runs: dict[str, list[Run]] = field(default_factory=dict)

    def right(self, output):
        """Its own tokens. Asserts that runs of its request wrote them, one of each phase in an attempt, and that none
        is missing."""
        runs = {f"{run.salt}": run for run in self.runs.get(self.rid, ())}
        salts = {name: run.salt for name, run in runs.items()}
        found = writers(self.prompt, output.ids, output.sampling, VOCABULARY, TOKEN_BYTES, salts)
        prefilled = {run.attempt for run in runs.values() if run.phase == "p"}
        before = {(0, None)}  # the attempt and, after its first token, the run that goes on; by chance, several fit
        for index, names in enumerate(found):
            after = {next_of(runs[name], *place, prefilled) for name in names for place in before} - {None}
            assert after, f"client {self.key}: after {before}, token {index} of {output.ids} is of {sorted(names)}"
            before = after
        assert output.done.reason != "length" or len(output.ids) == output.sampling.max_tokens
        return output.ids


def next_of(run, attempt, decode, prefilled):
    """Where the answer is when `run` writes the token after that place; None: it must not. An attempt that was not
    `prefilled` goes on from the decode of an earlier one, which has moved."""
    if run.phase == "p":
        return (run.attempt, None) if run.attempt > attempt else None
    if run.attempt > attempt and run.attempt not in prefilled:
        return run.attempt, run
    return (attempt, run) if run.attempt == attempt and decode in (None, run) else None


class SaltedWorld(FaultyWorld):
    def __init__(self, *args, **kwargs):
        self.runs, self.count = {}, 0
        super().__init__(*args, **kwargs)

    def _clients(self, requests):
        made = super()._clients(requests)
        made.kind = partial(SaltedClient, runs=self.runs)
        return made

    def _worker(self, iid, role):
        node = super()._worker(iid, role)
        node.engine.salt = self.begin
        return node

    def begin(self, key):
        """The salt of a new engine request."""
        phase, rid, attempt = key.split(":")[:3]
        self.count += 1
        self.runs.setdefault(rid, []).append(Run(phase, int(attempt), self.count))
        return self.count


def salted(seed):
    """The world of a seed after its run, in which each answer was checked."""
    shape = some_shape(seed)
    world = SaltedWorld(shape.setup, shape.arrivals(seed), some_faults(seed), predictor=WildPredictor)
    world.run()
    return world


def test_each_attempt_is_written_by_one_prefill_and_one_decode_run():
    """And what the stories are worth: there are answers of several attempts."""
    continued = 0
    for seed in {*range(FIRST, FIRST + SEEDS), *ONCE_WRONG}:
        dones = [client.done for client in salted(seed).clients.clients]
        continued += sum(done.receipt.continued > 0 for done in dones)
    assert continued


class Twice(SaltedWorld):
    """One request of one chunk. Its Landed is lost, and so is the connection to the decode instance, so another one
    gets the request too. `lost`: the numbers of the messages to the broker, heartbeats not counted, that are lost."""

    def __init__(self, lost=()):
        self.lost, self.reports, self.broken = lost, 0, False
        arrival = Arrival(0.0, 8, 12, sampling=Sampling(max_tokens=12, ignore_eos=True))
        super().__init__(replace(ONE, decode=2), [arrival], Faults(until=0.0))
        for worker in self.workers.values():
            worker.port.send = partial(self.pass_on, worker.name, worker.port.send)

    def pass_on(self, sender, deliver, peer, message):
        if isinstance(message, Landed) and not self.broken:
            self.broken = True
            (line,) = (each for each in self.wiring.connections() if (each.src.name, each.name) == (peer, sender))
            line.break_off()
            return
        counts = peer == BROKER and not isinstance(message, Heartbeat | Ready)
        self.reports += counts
        if not (counts and self.reports - 1 in self.lost):
            deliver(peer, message)

    def tell(self):
        """How the request ended, and how often a second decode instance was refused. Its tokens are checked."""
        self.run()
        (client,) = self.clients.clients
        return client.done, self.broker.core.counters["decodes_refused"]


def test_of_two_decode_instances_the_first_that_reports_writes_it_and_the_other_stops():
    """The reports 3 and on are of d0: the more of them are lost, the longer both decode."""
    told = [Twice(range(3, last)).tell() for last in range(3, 20)]
    assert {(done.reason, done.receipt.attempts) for done, _ in told} == {("length", 1)}
    assert {done.receipt.decode_instance for done, _ in told} == {"d0", "d1"} and any(refused for _, refused in told)


@pytest.mark.parametrize("before", [(), (3, 4, 5, 6)], ids=["one", "the first of d0, and one"])
def test_whichever_report_is_lost_one_decode_instance_writes_it(before):
    for at in range(24):
        done, _ = Twice({*before, at}).tell()
        assert (done.reason, done.receipt.attempts) == ("length", 1)
