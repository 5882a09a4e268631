"""Who can exchange KV with whom, counted without looking at every pair."""

from collections import Counter
from random import Random

import pytest

from tests.core.broker.work import opcodes
from tests.core.build import FINGERPRINT, fingerprint, instance, reach, ready
from tetri.core.broker.compatibility import Compatibility, compatible_pairs
from tetri.core.broker.membership import Members
from tetri.policy.pairing import incompatibility, path

PATHS = [["shm"], ["stream"], ["shm", "stream"], ["local", "shm"], ["cuda_ipc", "shm"], ["nixl", "stream"]]


def drawn(rng, number):
    made = reach(
        f"i{number}",
        paths=rng.choice(PATHS),
        host=rng.choice("abc"),
        process=rng.randrange(3),
        device=rng.choice(["", "GPU-a", "GPU-b"]),
        near=rng.choice([[], ["GPU-a", "GPU-b"]]),
    )
    return instance(f"i{number}", "mixed", reach=made, fingerprint=rng.choice([FINGERPRINT, fingerprint(model="x")]))


@pytest.mark.parametrize("seed", range(20))
def test_it_finds_what_a_look_at_every_pair_finds(seed):
    rng = Random(seed)
    everybody = [drawn(rng, number) for number in range(rng.randrange(1, 30))]
    compatibility = Compatibility(everybody)
    for one in everybody:
        expected, odd = Counter(), []
        for other in everybody:
            why = incompatibility(one.fingerprint, other.fingerprint, one.reach, other.reach)
            if other is one:
                continue
            if why is None:
                expected[path(one.reach, other.reach)] += 1
            else:
                odd.append(f"never paired with {other.iid}: {why}")
        found = compatibility.others(one)
        assert found.paths == expected and compatibility.of(one).total == expected.total() + 1
        assert found.incompatibility in odd if odd else found.incompatibility == ""


def test_whoever_is_no_member_is_not_left_out():
    compatibility = Compatibility([instance("d0", "decode"), instance("d1", "decode")])
    assert compatibility.others(instance("p0", "prefill")).paths == {"shm": 2}
    assert compatibility.others(instance("d0", "decode")).paths == {"shm": 1}


def cluster(count, hosts, alike):
    """So many instances, half of each phase; one may be of another kind."""
    made = Members(1)
    for number in range(count):
        iid = f"i{number}"
        at = reach(iid, host=f"h{number % hosts}", process=number, paths=["local", "shm", "stream"])
        other = FINGERPRINT if alike or number else fingerprint(model="x")
        made.ready(ready(iid, "prefill" if number % 2 else "decode", reach=at, fingerprint=other), 0.0)
    return made


@pytest.mark.parametrize("hosts, alike", [(1, True), (1000, True), (1000, False), (20, False)])
def test_the_status_of_twice_as_many_takes_about_twice_the_work(hosts, alike):
    """Not four times, as a look at every pair would."""
    few, many = (opcodes(cluster(count, hosts, alike).status) for count in (100, 200))
    assert many < 2.5 * few


@pytest.mark.parametrize("seed", range(5))
def test_the_pairs_are_those_that_a_look_at_every_pair_finds(seed):
    rng = Random(seed)
    prefillers, decoders = ([drawn(rng, 100 * side + number) for number in range(8)] for side in (1, 2))
    both = drawn(rng, 0)
    expected = [
        (one.iid, other.iid)
        for one in [*prefillers, both]
        for other in [*decoders, both]
        if one is other or incompatibility(one.fingerprint, other.fingerprint, one.reach, other.reach) is None
    ]
    assert compatible_pairs([*prefillers, both], [*decoders, both]) == expected
