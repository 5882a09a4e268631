"""Messages of workers that no Membership lists yet. What a worker does with them is in test_worker.py."""

from tests.core.build import identity, instance, membership, offer
from tetri.core.instance.peers import Peers
from tetri.core.worker.unlisted import MOST_UNLISTED, Unlisted


def test_only_those_of_unlisted_senders_are_kept_once_and_not_too_many():
    peers = Peers(identity("d1", "decode"))
    peers.update(membership(1, instance("d1", "decode"), instance("p1", "prefill")))
    unlisted = Unlisted(peers)
    assert not unlisted.keeps(offer("a", 4)) and unlisted.keeps(offer("b", 4, incarnation=2))
    made = [offer(f"r{number}", 4, src="p3") for number in range(MOST_UNLISTED)]
    assert all(unlisted.keeps(message) for message in made)
    assert unlisted.release() == made and unlisted.release() == []
