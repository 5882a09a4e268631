"""tetri-cli flip against a fake broker."""

import io
import json
import sys

import pytest
from fake_broker import STATUS, FakeBroker

from tetri import cli

INSTANCES = [{"iid": iid, "role": role} for iid, role in (("p0", "prefill"), ("d0", "decode"))]


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Run tetri-cli against a broker that answers a ChangeRole as given: (exit status, stdout, stderr, broker)."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("TETRI_CONF", raising=False)
    (tmp_path / "tetri").mkdir()

    def run_cli(reply, *arguments):
        def script(message):
            if message["type"] == "inspect":
                return [{**STATUS, "instances": INSTANCES}]
            return [{"key": message["key"], **reply}]

        with FakeBroker(script) as broker:
            (tmp_path / "tetri" / "cluster.json").write_text(json.dumps({"clients": broker.address}))
            monkeypatch.setattr(sys, "stdin", io.StringIO())
            with pytest.raises(SystemExit) as ended:
                cli.main(["flip", *arguments])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return ended.value.code, out, err, broker

    return run_cli


CHANGED = {"type": "role_changed", "iid": "d0", "role": "prefill", "was": "decode", "took_s": 0.00312}


def refused(reason):
    return {"type": "refused", "reason": reason, "retry_after_s": None}


def test_one_line_tells_what_changed(run):
    status, out, err, broker = run(CHANGED, "d0", "prefill")
    assert (status, out, err) == (0, "d0: decode -> prefill in 3.1 ms\n", "")
    [message] = broker.seen
    assert (message["type"], message["iid"], message["role"]) == ("change_role", "d0", "prefill")


def test_json_is_one_object(run):
    status, out, err, _ = run(CHANGED, "d0", "prefill", "--json")
    assert (status, err) == (0, "")
    assert json.loads(out) == {"iid": "d0", "role": "prefill", "was": "decode", "took_s": 0.00312}


def test_a_role_that_does_not_exist_is_a_wrong_argument(run):
    status, out, err, broker = run(CHANGED, "d0", "tea")
    assert (status, out, broker.seen) == (2, "", [])
    assert "'tea' is not one of 'prefill', 'decode', 'mixed'" in err


def test_an_instance_that_does_not_exist_is_a_wrong_argument(run):
    status, out, err, _ = run(refused("there is no instance 'd7', only d0, p0"), "d7", "prefill")
    assert (status, out) == (2, "") and "tetri-cli: there is no instance 'd7', only d0, p0 (see" in err
    status, _, err, broker = run(CHANGED, "", "prefill")
    assert status == 2 and "an instance's name is a text of 1 to 128 characters" in err and not broker.seen


def test_what_the_cluster_cannot_do_now_is_a_failure(run):
    why = "d0 is the last decode instance: flip another one to decode first, or make it mixed"
    assert run(refused(why), "d0", "prefill")[:3] == (1, "", f"tetri-cli: {why}\n")


def test_a_worker_that_does_not_answer(run):
    status, _, err, _ = run({"type": "other"}, "d0", "prefill", "--timeout", "0.3")
    assert status == 3 and "no answer from the broker for 0.3 s: is it up, and is d0 not stuck?" in err
