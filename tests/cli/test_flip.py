"""tetri-cli flip against a fake broker."""

import json

import pytest
from fake_broker import STATUS, instance

CHANGED = {"type": "role_changed", "iid": "d0", "role": "prefill", "was": "decode", "took_s": 0.00312}
LAST = "d0 is the last decode instance: flip another one to decode first, or make it mixed"


@pytest.fixture
def answering(broker):
    """A broker that answers a ChangeRole like this."""
    instances = [instance("p0", "prefill"), instance("d0", "decode")]

    def start(**reply):
        def script(message):
            asked = message["type"] == "inspect"
            return [{**STATUS, "instances": instances} if asked else {"key": message["key"], **reply}]

        return broker(script)

    return start


def test_what_changed_is_one_line_or_one_object(run, answering):
    fake = answering(**CHANGED)
    assert run("flip", "d0", "prefill") == (0, "d0: decode -> prefill in 3.1 ms\n", "")
    [message] = fake.seen
    assert (message["type"], message["iid"], message["role"]) == ("change_role", "d0", "prefill")
    status, out, err = run("flip", "d0", "prefill", "--json")
    assert (status, err) == (0, "")
    assert json.loads(out) == {"iid": "d0", "role": "prefill", "was": "decode", "took_s": 0.00312}


@pytest.mark.parametrize(
    ("iid", "role", "says"),
    [
        ("d0", "tea", "'tea' is not one of 'prefill', 'decode', 'mixed'"),
        ("", "prefill", "an instance's name is a text of 1 to 128 characters"),
    ],
)
def test_a_wrong_argument_is_not_sent(run, answering, iid, role, says):
    fake = answering(**CHANGED)
    status, out, err = run("flip", iid, role)
    assert (status, out, fake.seen) == (2, "", []) and says in err


@pytest.mark.parametrize(
    ("iid", "reason", "status", "says"),
    [
        ("d7", "there is no instance 'd7', only d0, p0", 2, "there is no instance 'd7', only d0, p0 (see tetri-cli"),
        ("d0", LAST, 1, f"{LAST}\n"),
    ],
    ids=["unknown", "not now"],
)
def test_what_the_cluster_refuses(run, answering, iid, reason, status, says):
    answering(type="refused", reason=reason, retry_after_s=None)
    found, out, err = run("flip", iid, "prefill")
    assert (found, out) == (status, "") and err.startswith(f"tetri-cli: {says}")


def test_a_worker_that_does_not_answer(run, answering):
    answering(type="other")
    status, _, err = run("flip", "d0", "prefill", "--timeout", "0.2")
    assert status == 3 and "no answer from the broker for 0.2 s: is it up, and is d0 not stuck?" in err
