"""What is asked of the broker besides requests: to cancel another's, its status, another role for an instance."""

import pytest
from fake_broker import STATUS, FakeBroker, Scripted, accepted, done

import tetri
from tests.client.script import FAST, refused
from tetri.client import BadRequest, RequestRefused


def test_cancelling_a_request_of_someone_else_and_the_status():
    fake = FakeBroker(lambda m: [done("r9", "cancelled") if m["rid"] == "r9" else refused(m["rid"])])
    with fake as broker, tetri.Client(broker.address, **FAST) as client:
        client.cancel("r9")
        with pytest.raises(RequestRefused, match="no such request"):
            client.cancel("r8")
    fake = FakeBroker(Scripted(inspect=[lambda m: [], lambda m: [STATUS]]))
    with fake as broker, tetri.Client(broker.address, **FAST) as client:
        assert client.status() == {k: v for k, v in STATUS.items() if k != "type"}


def change(message, **changes):
    """The instance has changed its role."""
    asked = {name: message[name] for name in ("key", "iid", "role")}
    return {"type": "role_changed", "was": "decode", "took_s": 0.004, **asked, **changes}


def test_a_flip_is_asked_for_with_one_key_until_it_is_answered(call):
    def wrong(message):
        own = message["key"]
        return [change(message, key="other"), accepted({"key": own}), change(message, took_s="soon")]

    with FakeBroker(Scripted(change_role=[lambda m: [], wrong, lambda m: [change(m)]])) as broker:
        changed = {"iid": "d0", "role": "mixed", "was": "decode", "took_s": 0.004}
        assert call(broker.address, "flip", "d0", "mixed") == changed
    assert len(broker.seen) >= 3 and len({message["key"] for message in broker.seen}) == 1
    assert (broker.seen[0]["iid"], broker.seen[0]["role"]) == ("d0", "mixed")


def test_a_flip_that_makes_no_sense_is_not_asked_for_and_one_may_be_refused(call):
    roles = "role must be prefill, decode or mixed, got 'tea'"
    with FakeBroker(lambda m: [refused(m["key"], "d0 is the last")]) as broker:
        for iid, role, why in (("d0", "tea", roles), ("d" * 129, "mixed", "1 to 128 characters")):
            with pytest.raises(BadRequest, match=why):
                call(broker.address, "flip", iid, role)
        assert broker.seen == []
        with pytest.raises(RequestRefused, match="d0 is the last"):
            call(broker.address, "flip", "d0", "mixed")
