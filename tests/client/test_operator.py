"""What operators ask of the broker: another role for an instance, the end of anybody's request, the status."""

import json

import pytest
from fake_broker import STATUS, FakeBroker, Scripted, accepted, done
from observed import observation, timeline

from tests.client.script import FAST, refused
from tetri.client import BadRequest, Operator, RequestRefused, Unreachable


def change(message, **changes):
    """The instance has changed its role."""
    asked = {name: message[name] for name in ("key", "iid", "role")}
    return {"type": "role_changed", "was": "decode", "took_s": 0.004, **asked, **changes}


def test_a_flip_is_asked_for_with_one_key_until_it_is_answered():
    def wrong(message):
        own = message["key"]
        return [change(message, key="other"), accepted({"key": own}), change(message, took_s="soon")]

    with FakeBroker(Scripted(change_role=[lambda m: [], wrong, lambda m: [change(m)]])) as broker:
        changed = {"iid": "d0", "role": "mixed", "was": "decode", "took_s": 0.004}
        with Operator(broker.address, **FAST) as operator:
            assert operator.flip("d0", "mixed") == changed
    assert len(broker.seen) >= 3 and len({message["key"] for message in broker.seen}) == 1
    assert (broker.seen[0]["iid"], broker.seen[0]["role"]) == ("d0", "mixed")


def test_a_flip_that_makes_no_sense_is_not_asked_for_and_one_may_be_refused():
    roles = "role must be prefill, decode, mixed or auto, got 'tea'"
    fake = FakeBroker(lambda m: [refused(m["key"], "d0 is the last")])
    with fake as broker, Operator(broker.address, **FAST) as operator:
        for iid, role, why in (("d0", "tea", roles), ("d" * 129, "mixed", "1 to 128 characters")):
            with pytest.raises(BadRequest, match=why):
                operator.flip(iid, role)
        assert broker.seen == []
        with pytest.raises(RequestRefused, match="d0 is the last"):
            operator.flip("d0", "mixed")


def test_a_request_of_any_client_ends_without_a_secret():
    def reply(message):
        assert message == {"type": "end_request", "rid": message["rid"]}
        return [done("r9", "cancelled") if message["rid"] == "r9" else refused(message["rid"])]

    with FakeBroker(reply) as broker, Operator(broker.address, **FAST) as operator:
        operator.end("r9")
        with pytest.raises(RequestRefused, match="no such request"):
            operator.end("r8")


def test_an_operator_looks_on_as_a_client_does():
    def reply(message):
        rid, choice = message.get("rid"), message.get("choice")
        return [observation(serial=8) if message["type"] == "observe" else timeline(rid=rid, choice=choice)]

    with FakeBroker(reply) as broker, Operator(broker.address, **FAST) as operator:
        assert operator.observe(3, 7)["serial"] == 8 and operator.explain("r1", 2)["rid"] == "r1"
    assert broker.seen == [
        *({"type": "observe", "epoch": 3, "since": 7}, {"type": "explain", "rid": "r1", "choice": 2})
    ]


def test_the_address_is_that_of_operators_in_the_run_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("TETRI_CONF", raising=False)
    with pytest.raises(Unreachable, match="run tetri-cli up"):
        Operator()
    (tmp_path / "tetri").mkdir(mode=0o700)
    with FakeBroker(lambda m: [STATUS]) as broker:
        state = {"clients": "ipc:///nowhere", "operators": broker.address}
        (tmp_path / "tetri" / "cluster.json").write_text(json.dumps(state))
        with Operator(**FAST) as operator:
            assert operator.status() == {name: value for name, value in STATUS.items() if name != "type"}
