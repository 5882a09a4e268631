"""What every KV path promises (tetri/kv/base.py), as tests that run over any: a class with a `world` fixture that gives
a World of the path and closes it. Nothing here knows whether an answer comes at once or later."""

import random
from itertools import permutations

import msgspec
import pytest
import xxhash

from tests.kv.parties import BLOCK, SLOTS, World, block
from tetri.kv.base import KVCorrupt, KVError, KVForeign, KVLost

GONE = (KVLost, KVForeign)

NO_NAMES = ["tetri-test-p0-0123456789abcdef", "", "../../etc/passwd", "tetri-test-p0\0", "tetri-\ud800"]
FORGED = {
    "slots": [[SLOTS], [(1 << 63) - 1], [-1], [1 << 70], [0, 1], []],
    "generations": [[-1], [1 << 63], [1 << 70], []],
    "block_bytes": [BLOCK + 1, 0, 1 << 62, 1 << 70],
    "segment": [*NO_NAMES, "tetri-test-" + "x" * 100_000],
}
FORGERIES = [{field: value} for field, values in FORGED.items() for value in values]
FORGERIES += [{"slots": [0] * times, "generations": [1] * times} for times in (2, 100_000)]


def assert_right_or(allowed, receiver, asked):
    """Each take was answered with its chunk's blocks, or with a problem that is allowed; how many with the blocks."""
    answers = [(receiver.answers[ticket], list(chunk.blocks)) for ticket, chunk in asked]
    assert [answer for answer, right in answers if answer != right and not isinstance(answer, allowed)] == []
    return sum(answer == right for answer, right in answers)


class StoreContract:
    World: type[World]  # unless there is another fixture `world`

    @pytest.fixture
    def world(self, tmp_path):
        world = self.World(tmp_path)
        yield world
        world.close()
        assert list(tmp_path.iterdir()) == []

    def test_blocks_arrive_in_order_and_the_digest_is_over_all(self, pair):
        sender, receiver = pair
        chunk = sender.put(block(1), block(2), block(3))
        assert chunk.digest == xxhash.xxh3_64_intdigest(block(1) + block(2) + block(3))
        assert sender.store.free_slots == SLOTS - 3
        assert receiver.fetch(chunk) == [block(1), block(2), block(3)]

    @pytest.mark.parametrize("size", [1, 4096, 1_000_000, 2_500_001])
    def test_blocks_of_any_size(self, world, size):
        sender, receiver = world.pair(block_bytes=size)
        for numbers in ([1], [2, 3, 4], [5]):  # of fewer, more and fewer blocks than before
            blocks = [block(number, size) for number in numbers]
            assert receiver.fetch(sender.put(*blocks)) == blocks

    def test_a_chunk_may_fill_the_slab_of_a_peer_that_is_larger_than_the_own(self, world):
        sender, receiver = world.open("p0", slots=64, block_bytes=1000), world.open("d0", slots=1)
        receiver.meet(sender)
        blocks = [block(number, 1000) for number in range(64)]
        assert receiver.fetch(sender.put(*blocks)) == blocks

    def test_the_copy_is_the_receivers_own(self, pair):
        sender, receiver = pair
        chunk = sender.put(block(1))

        def reuse():
            sender.free(chunk)
            sender.put(*(block(at) for at in range(2, 2 + sender.store.free_slots)))

        receiver.before_reading = reuse
        assert receiver.fetch(chunk) == [block(1)]

    def test_a_freed_or_reused_slot_is_lost(self, pair):
        sender, receiver = pair
        chunk = sender.put(block(1))
        assert receiver.fetch(chunk) == [block(1)]
        sender.free(chunk)
        with pytest.raises(GONE):
            receiver.fetch(chunk)
        full = sender.put(*[block(1)] * sender.store.free_slots)
        with pytest.raises(KVLost):  # even with the same bytes in it
            receiver.fetch(chunk)
        assert receiver.fetch(full) == [block(1)] * len(full.handle.slots)

    def test_a_closed_store_is_gone(self, world):
        world.expect_the_worst()
        sender, receiver = world.pair()
        chunks = [sender.put(block(number)) for number in range(4)]
        tickets = [receiver.ask(chunk) for chunk in chunks]
        sender.close()
        sender.store.close()
        world.settle()
        tickets.append(receiver.ask(chunks[0]))  # what is mapped may still be read
        world.settle()
        assert_right_or(GONE, receiver, zip(tickets, [*chunks, chunks[0]], strict=True))

    def test_a_receiver_that_ends_in_the_middle_leaves_no_slot_behind(self, world, pair):
        sender, receiver = pair
        for number in range(4):
            receiver.ask(sender.put(block(number)))
        receiver.close()
        receiver.store.close()
        sender.give_back()
        world.wait(lambda: sender.store.free_slots == SLOTS, "slots kept for a receiver that has ended")

    def test_a_wrong_digest_and_swapped_blocks_are_corrupt(self, pair):
        sender, receiver = pair
        chunk = sender.put(block(1))
        with pytest.raises(KVCorrupt):
            receiver.fetch(chunk, digest=chunk.digest ^ 1)
        assert receiver.fetch(chunk) == [block(1)]
        chunk = sender.put(block(1), block(2))
        slots, generations = chunk.handle.slots[::-1], chunk.handle.generations[::-1]
        with pytest.raises(KVCorrupt):
            receiver.fetch(chunk, handle=msgspec.structs.replace(chunk.handle, slots=slots, generations=generations))

    def test_without_a_digest_there_is_none(self, world):
        sender, receiver = world.pair(digest=False)
        chunk = sender.put(block(1), block(2))
        assert chunk.digest is None
        assert receiver.fetch(chunk) == [block(1), block(2)]

    @pytest.mark.parametrize("fields", FORGERIES, ids=range(len(FORGERIES)))
    def test_a_forged_handle_is_foreign_or_lost(self, pair, fields):
        sender, receiver = pair
        chunk = sender.put(block(1))
        with pytest.raises(GONE) as caught:
            receiver.fetch(chunk, handle=msgspec.structs.replace(chunk.handle, **fields))
        assert len(str(caught.value)) < 400 and str(caught.value).isprintable()
        assert receiver.fetch(chunk) == [block(1)]

    def test_a_slot_that_holds_nothing_is_an_error(self, pair):
        sender, receiver = pair
        chunk = sender.put(block(1))
        (slot,) = {*range(SLOTS)} - {*sender.put(*[block(2)] * (SLOTS - 2)).handle.slots, *chunk.handle.slots}
        with pytest.raises((*GONE, KVCorrupt)):
            receiver.fetch(chunk, handle=msgspec.structs.replace(chunk.handle, slots=[slot]))

    def test_another_peers_chunk_is_foreign_or_lost(self, world, pair):
        sender, receiver = pair
        other = world.open("p1")
        receiver.meet(other)
        chunks = sender.put(block(1)), other.put(block(2))
        for chunk, wrong in zip(chunks, ("p1", "p0"), strict=True):
            with pytest.raises(GONE):
                receiver.fetch(chunk, peer=wrong)
        assert [receiver.fetch(chunk) for chunk in chunks] == [[block(1)], [block(2)]]

    def test_nothing_comes_from_who_was_never_met(self, world):
        sender, receiver = world.open("p0"), world.open("d0")
        with pytest.raises(KVLost):
            receiver.fetch(sender.put(block(1)))
        receiver.store.part("p0")

    def test_parted_from_each_take_is_answered_once_and_later_ones_are_lost(self, world, pair):
        sender, receiver = pair
        chunks = [sender.put(block(number)) for number in range(4)]
        tickets = [receiver.ask(chunk) for chunk in chunks]
        receiver.store.part("p0")
        world.settle()
        assert_right_or(KVLost, receiver, zip(tickets, chunks, strict=True))
        with pytest.raises(KVLost):
            receiver.fetch(chunks[0])
        receiver.store.part("p0")
        receiver.meet(sender)
        assert receiver.fetch(chunks[0]) == [block(0)]

    def test_another_incarnation_is_another_slab(self, world, pair):
        sender, receiver = pair
        old = sender.put(block(1))
        assert receiver.fetch(old) == [block(1)]
        pending = receiver.ask(old)
        sender.close()
        again = world.open("p0")
        receiver.meet(again)
        world.settle()
        assert_right_or(GONE, receiver, [(pending, old)])
        new = again.put(block(2))
        assert receiver.fetch(new) == [block(2)]
        with pytest.raises(GONE):
            receiver.fetch(old)
        receiver.meet(again)  # told again what is known
        assert receiver.fetch(new) == [block(2)]

    @pytest.mark.parametrize("seed", range(3))
    def test_in_a_long_history_nothing_wrong_comes_and_nothing_stays(self, world, seed):
        """Each sends to and fetches from each other."""
        rng, parties, asked = random.Random(seed), [world.open(f"m{i}") for i in range(4)], []
        for receiver, sender in permutations(parties, 2):
            receiver.meet(sender)
        for number in range(300):
            sender, receiver = rng.sample(parties, 2)
            match rng.choice(["put", "put", "ask", "ask", "ask", "free", "hear", "settle", "part", "wrong"]):
                case "put":
                    count = rng.randint(0, min(3, sender.store.free_slots))
                    sender.put(*(block(number * 10 + at) for at in range(count)))
                case "ask" if sender.live:
                    chunk = rng.choice(sender.live)
                    asked.append((receiver, receiver.ask(chunk), chunk, KVLost))
                case "wrong" if sender.live:
                    chunk = rng.choice(sender.live)
                    asked.append((receiver, receiver.ask(chunk, digest=rng.getrandbits(64)), chunk, KVError))
                case "free" if sender.live:
                    sender.free(rng.choice(sender.live))
                case "hear":
                    receiver.hear()
                case "settle":  # or over a path that takes time everything would be lost at the next "free" and "part"
                    world.settle()
                case "part" if rng.random() < 0.2:
                    receiver.store.part(sender.iid)
                    receiver.meet(sender)
        world.settle()
        right = [assert_right_or(allowed, receiver, [(ticket, chunk)]) for receiver, ticket, chunk, allowed in asked]
        assert sum(right) > len(asked) // 4
