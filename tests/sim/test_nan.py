"""A request for which the model computes no valid number ends with an error, whatever message is lost."""

from dataclasses import replace

import pytest

from tests.sim.shapes import ONE
from tests.sim.test_ends import SHAPES, Story
from tetri.engine.emulated import reference
from tetri.engine_request import INVALID
from tetri.request import Sampling
from tetri.sim.faulty.chance import Faults
from tetri.sim.faulty.processes import TOKEN_BYTES, VOCABULARY
from tetri.sim.faulty.world import FaultyWorld
from tetri.sim.traces import Arrival

SAMPLING = Sampling(max_tokens=6, ignore_eos=True)


class Poison:
    """Every engine computes no valid number after this token; None: it always does."""

    token = None

    def _worker(self, iid, role):
        node = super()._worker(iid, role)
        node.engine.nan_token = self.token
        return node


class Poisoned(Poison, Story):
    def __init__(self, setup, token=None, at=None, fault=""):
        self.token = token
        super().__init__(setup, SAMPLING, at, fault)


class Together(Poison, FaultyWorld):
    def __init__(self, setup, arrivals, token=None):
        self.token = token
        super().__init__(setup, arrivals, Faults(until=0.0))


def outputs(client):
    return reference(client.prompt, SAMPLING, VOCABULARY, TOKEN_BYTES)


@pytest.mark.parametrize("tokens", [0, 1, 4], ids=["in prefill", "at the first token", "in decode"])
@pytest.mark.parametrize("shape", SHAPES)
def test_whatever_message_is_lost_it_ends_with_an_error(shape, tokens):
    for seed in range(50):  # one in which the poison comes where it should
        setup = replace(SHAPES[shape], seed=seed)
        story = Poisoned(setup)
        story.tell()
        (client,) = story.clients.clients
        poison = client.prompt[0] if tokens == 0 else outputs(client)[tokens - 1]
        if tokens == 0 or poison not in [*client.prompt, *outputs(client)[: tokens - 1]]:
            break
    without = Poisoned(setup, poison)
    told = [without.tell()]
    told += [Poisoned(setup, poison, at, "lost").tell() for at in range(without.sent)]
    assert {(done.reason, done.error, done.usage.completion_tokens) for done in told} == {("error", INVALID, tokens)}
    assert {done.receipt.attempts for done in told} == {1} and without.sent >= 2


def test_its_neighbours_go_on_and_its_worker_lives():
    arrivals = [Arrival(0.0, 6, SAMPLING.max_tokens, sampling=SAMPLING) for _ in range(3)]
    setup = replace(ONE, kv_tokens=128)
    alone = Together(setup, arrivals)
    alone.run()
    clients = alone.clients.clients
    mine = next(client for client in clients for token in outputs(client)[1:4] if not_of_others(token, client, clients))
    poison = next(token for token in outputs(mine)[1:4] if not_of_others(token, mine, clients))
    world = Together(setup, arrivals, poison)
    world.run()
    reasons = {client.number: client.done.reason for client in world.clients.clients}
    assert reasons == {client.number: "error" if client.number == mine.number else "length" for client in clients}
    counters = world.broker.core.counters
    assert counters["ended_error"] == 1 and not counters["workers_lost"] and not counters["restarts"]


def not_of_others(token, mine, clients):
    others = [client for client in clients if client is not mine]
    return not any(token in (*client.prompt, *outputs(client)) for client in others) and token not in mine.prompt
