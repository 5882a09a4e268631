"""What a client asks of the broker besides requests: to cancel one of its own, and the status."""

import asyncio

import pytest
from fake_broker import STATUS, FakeBroker, Scripted, answer, done
from observed import timeline

import tetri
from tests.client.script import FAST, refused
from tetri.client import RequestRefused


def test_cancelling_by_id_shows_the_secret_of_the_client():
    """As for a request that has ended here; of another client's, the broker knows nothing."""

    def reply(message):
        if message["type"] == "submit":
            return answer(message)
        own = message["secret"] == broker.seen[0]["secret"] and message["rid"] == "r1"
        return [done("r1", "cancelled") if own else refused(message["rid"])]

    with FakeBroker(reply) as broker, tetri.Client(broker.address, **FAST) as client:
        client.generate("hi")
        client.cancel("r1")
        with pytest.raises(RequestRefused, match="no such request"):
            client.cancel("r8")
        with tetri.Client(broker.address, **FAST) as other, pytest.raises(RequestRefused, match="no such request"):
            other.cancel("r1")


def test_the_status_is_asked_for_until_it_comes():
    fake = FakeBroker(Scripted(inspect=[lambda m: [], lambda m: [STATUS]]))
    with fake as broker, tetri.Client(broker.address, **FAST) as client:
        assert client.status() == {k: v for k, v in STATUS.items() if k != "type"}


READINESS = {"type": "readiness", "ready": False, "why": "no pair", "within_s": 30.0, "in_service": 0, "pairs": []}


def test_the_readiness_is_asked_for_until_it_comes():
    fake = FakeBroker(Scripted(check_readiness=[lambda m: [STATUS], lambda m: [READINESS]]))
    with fake as broker, tetri.Client(broker.address, **FAST) as client:
        assert client.readiness() == {name: value for name, value in READINESS.items() if name != "type"}


def test_the_readiness_and_the_status_may_be_asked_for_at_once():
    replies = {"check_readiness": READINESS, "inspect": STATUS}

    async def ask(address):
        async with tetri.AsyncClient(address, **FAST) as client:
            return await asyncio.gather(client.status(), client.readiness())

    with FakeBroker(lambda message: [replies[message["type"]]]) as broker:
        status, readiness = asyncio.run(ask(broker.address))
    assert status["model"] == STATUS["model"] and readiness["why"] == "no pair"


def test_a_choice_is_explained_by_its_id_and_by_its_number_at_once():
    """Each call gets the answer to its own question, in whatever order they come."""

    async def ask(address):
        async with tetri.AsyncClient(address, **FAST) as client:
            asked = [client.explain("r1"), client.explain("r1", 2), client.explain("r1.1"), client.explain("r8", 1)]
            return await asyncio.gather(*asked, return_exceptions=True)

    def reply(message):
        rid, _, index = message["rid"].partition(".")
        choice = int(index or message["choice"])
        return [refused("r8.1") if rid == "r8" else timeline(rid=rid, choice=choice)]

    with FakeBroker(reply) as broker:
        *found, unknown = asyncio.run(ask(broker.address))
    assert [each["choice"] for each in found] == [0, 2, 1] and isinstance(unknown, RequestRefused)
