"""A request that kills every worker that computes it: three of them at most, and nobody else's answer.
TETRI_SEEDS=20 asks for more of each."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from tests.sim.shapes import SETUP
from tetri.core.broker.suspects import GUILTY
from tetri.request import Sampling
from tetri.sim.faulty.chance import Faults
from tetri.sim.faulty.world import FaultyWorld
from tetri.sim.traces import Arrival

SEEDS = min(int(os.environ.get("TETRI_SEEDS", "1")), 20)
SAMPLING = Sampling(max_tokens=12, ignore_eos=True)
MANY = replace(
    SETUP,
    prefill=8,
    decode=8,
    kv_tokens=256,
    block_tokens=4,
    chunk_tokens=16,
    max_batch=8,
    context=64,
    slots=40,
    stream_interval=1,
    timeouts=replace(SETUP.timeouts, max_attempts=8, max_deaths=3),
)
SHAPES = {
    "8 + 8": MANY,
    "8 + 8, tokens in fours": replace(MANY, stream_interval=4),
    "two that do both": replace(MANY, prefill=0, decode=0, mixed=1, auto=1),
    "one that does both": replace(MANY, prefill=0, decode=0, mixed=1),
    "one of each": replace(MANY, prefill=1, decode=1),
}
WHEN = [{"prefilled": 0}, {"prefilled": 33}, {"written": 1}, {"written": 7}, {"prefilled": 0, "written": 0}]
LOST = {"nothing": Faults(until=0.0), "last words": Faults(until=1.5)}  # half the last messages of those who die


class Deadly(FaultyWorld):
    """Whoever computes request number `poison` dies in the middle of that step: in prefill, once `prefilled` tokens are
    computed; in decode, once it has written `written` tokens. None: that phase does not kill."""

    def __init__(self, setup, faults, *, prefilled=None, written=None, poison=5, requests=24):
        self.prefilled, self.written, self.poison, self.deaths = prefilled, written, poison, []
        arrivals = [Arrival(0.002 * number, 6 + number % 30, 12, sampling=SAMPLING) for number in range(requests)]
        arrivals[poison] = replace(arrivals[poison], prompt=40)
        super().__init__(setup, arrivals, faults)

    def _worker(self, iid, role):
        node = super()._worker(iid, role)
        plan = node.engine.plan

        def deadly(most=1, chunk=None):
            planned = plan(most, chunk)
            if self._kills(node.engine, planned):
                self.kernel.at(self.kernel.now + 0.0005, self._die, node)
            return planned

        node.engine.plan = deadly
        return node

    def _kills(self, engine, planned):
        prompt = self.clients.clients[self.poison].prompt if len(self.clients.clients) > self.poison else ()

        def mine(key):
            return prompt and engine.contents[key].tokens[: len(prompt)] == list(prompt)

        prefills = [span for span in planned.chunk if mine(span.key)]
        decodes = [slot for slot in planned.batch if mine(slot.key)]
        return (self.prefilled is not None and any(span.stop > self.prefilled for span in prefills)) or (
            self.written is not None
            and any(slot.known + planned.steps > len(prompt) + self.written for slot in decodes)
        )

    def _die(self, node):
        if node.alive:
            self.deaths.append(node.name)
            node.kill(self.chance)
            self.chance.recovers(self._restart, node)


CASES = [(shape, when, "last words") for shape in SHAPES for when in WHEN]
CASES += [("8 + 8", when, "nothing") for when in WHEN[1:3]]


@pytest.mark.parametrize(("shape", "when", "lost"), CASES, ids=str)
def test_it_kills_three_at_most_and_ends_with_an_error_and_all_others_end_well(shape, when, lost):
    for seed in range(SEEDS):
        world = Deadly(replace(SHAPES[shape], seed=seed), LOST[lost], **when)
        world.run()  # checks every token of every client, and that all memory comes back
        (poison,) = [client.done for client in world.clients.clients if client.number == world.poison]
        others = [client.done for client in world.clients.clients if client.done is not poison]
        assert {done.reason for done in others} == {"length"}
        assert len(world.deaths) == 3 and poison.reason == "error", (seed, world.deaths, poison)
        named = f"{GUILTY}: 3 of them were lost with it ({', '.join(world.deaths)}), and the last one, "
        assert poison.error == f"{named}{world.deaths[-1]}, while it computed this request alone"
        instances = len(world.workers) // 2
        assert len({*world.deaths}) == 3 or instances < 8  # another one each time


class Killed(Deadly):
    """An operator kills an instance twice, with everything that it has."""

    def __init__(self, setup, victim):
        self.victim = victim
        super().__init__(setup, LOST["last words"])

    def _start(self):
        super()._start()
        for at_s in (0.06, 0.15):
            self.kernel.at(at_s, self._kill_one)

    def _kill_one(self, _):
        self._die(self.workers[self.victim])


VICTIMS = [("one of each", "p0"), ("one of each", "d0"), ("one that does both", "m0")]


@pytest.mark.parametrize(("shape", "victim"), VICTIMS)
def test_two_kills_that_are_nobodys_fault_end_nobody(shape, victim):
    """Those that it held both times run alone, and cost the others little."""
    for seed in range(3 * SEEDS):
        world = Killed(replace(SHAPES[shape], seed=seed), victim)
        world.run()
        assert {client.done.reason for client in world.clients.clients} == {"length"}, seed
        assert world.deaths and not world.broker.core.counters["guilty"]
