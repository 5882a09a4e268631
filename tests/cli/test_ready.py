"""tetri-cli ready against a fake broker."""

import json

import pytest

CARRIED = {"prefill": "p0", "decode": "d0", "state": "carried", "age_s": 1.25, "why": ""}
BROKEN = {"prefill": "p0", "decode": "d1", "state": "broken", "age_s": 9.5, "why": "lost"}
READY = {"type": "readiness", "ready": True, "why": "", "within_s": 30.0, "in_service": 1, "pairs": [CARRIED]}
NOT_READY = {**READY, "ready": False, "why": "p0 to d1 is broken: lost", "in_service": 3, "pairs": [BROKEN, CARRIED]}


def test_it_shows_each_pair_and_fails_unless_all_are_ready(run, broker):
    fake = broker(lambda message: [READY])
    assert run("ready") == (0, "ready\np0 to d0: carried 1.2 s ago\n", "")
    assert fake.seen == [{"type": "check_readiness"}]
    broker(lambda message: [NOT_READY])
    status, out, _ = run("ready", "--wait", "0")
    assert status == 1 and out.splitlines() == [
        "not ready: p0 to d1 is broken: lost",
        "p0 to d1: broken: lost",
        "p0 to d0: carried 1.2 s ago",
        "1 more pairs",
    ]


def test_it_waits_until_all_are_ready(run, broker):
    answers = iter([NOT_READY, READY])
    broker(lambda message: [next(answers)])
    status, out, _ = run("ready", "--wait", "20", "--json")
    assert status == 0 and json.loads(out) == {name: value for name, value in READY.items() if name != "type"}


@pytest.mark.parametrize("wait", ["-1", "soon"])
def test_a_wait_is_a_number_of_seconds(run, broker, wait):
    assert run("ready", "--wait", wait)[0] == 2
