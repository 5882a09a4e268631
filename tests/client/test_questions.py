"""What a client asks of the broker besides requests: to cancel one of its own, and the status."""

import pytest
from fake_broker import STATUS, FakeBroker, Scripted, answer, done

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
