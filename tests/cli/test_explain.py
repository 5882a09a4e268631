"""tetri-cli explain against a fake broker."""

import json

import pytest
from fake_broker import Scripted
from observed import observation, timeline


def ended(rid, jct_s, reason="stop", **fields):
    known = {"rid": rid, "reason": reason, "age_s": 5.0, "ttft_s": 0.1, "tpot_s": None, "jct_s": jct_s}
    known |= {"slo_result": "ttft", "prompt_tokens": 9, "outputs": 1, "attempts": 1, "prefill": "p0", "decode": "d0"}
    return {**known, **fields}


ENDED = [ended("slow.1", 9.0), ended("failed", 1.0, "error", ttft_s=None, decode=""), ended("quick", 0.5)]


def explained(message):
    if message["rid"] == "gone":
        return [{"type": "refused", "key": "gone", "reason": "nothing is known of gone", "retry_after_s": None}]
    return [timeline(rid=message["rid"], choice=message["choice"])]


@pytest.fixture
def served(broker):
    script = Scripted(explain=[explained], observe=[lambda message: [observation(ended=[])]])
    return broker(script)


def listing(broker, found=ENDED):
    look = {**observation(), "ended": found}
    return broker(Scripted(explain=[explained], observe=[lambda message: [look]]))


def test_it_shows_the_waterfall_and_names_retry_migration_and_preemption(run, served):
    status, out, err = run("explain", "r1")
    assert (status, err) == (0, "") and "\x1b" not in out
    for line in ("retry     at 1.00 s: attempt 2: d0 was lost", "migrated  at 1.50 s", "preempted at 1.60 s"):
        assert line in out
    assert "steps     5 on d1" in out and out.startswith("request   r1: length, arrived 12 s ago")


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["r1"], ("r1", 0)),
        (["cmpl-r1"], ("r1", 0)),
        (["chatcmpl-r1", "--choice", "2"], ("r1", 2)),
        (["r1.3"], ("r1", 3)),
        (["r1.3", "--choice", "0"], ("r1", 0)),
    ],
)
def test_an_id_is_that_of_a_request_a_choice_or_an_http_answer(run, served, arguments, meant):
    assert run("explain", *arguments)[0] == 0
    assert (served.seen[0]["rid"], served.seen[0]["choice"]) == meant


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["r1", "--slowest"], "--slowest is for the list: leave out RID"),
        (["r1", "--failed"], "--failed is for the list"),
        (["r1", "--last", "20"], "--last is for the list"),
        (["--choice", "1"], "--choice is of a request: give RID"),
        (["r1", "--choice", "10000"], "not in the range"),
        (["r" * 129], "length <= 128"),
    ],
)
def test_what_cannot_be_meant_is_one_line(run, served, arguments, says):
    status, out, err = run("explain", *arguments)
    assert (status != 0, out) == (True, "") and says in err and err.count("\n") == 1 and not served.seen


def test_json_is_the_timeline(run, served):
    assert json.loads(run("explain", "r1", "--json")[1]) == {
        key: value for key, value in timeline().items() if key != "type"
    }


def test_an_unknown_request_is_one_line_that_says_what_to_try(run, served):
    status, out, err = run("explain", "gone")
    assert (status, out) == (1, "") and err == (
        "tetri-cli: nothing is known of gone. Only the last requests are kept: tetri-cli explain lists them\n"
    )


def test_without_an_id_it_lists_the_last_requests(run, broker):
    listing(broker)
    head, *rows = [line.split() for line in run("explain")[1].splitlines()]
    assert head[0] == "request" and head[-3:] == ["prompt", "output", "instances"]
    assert [row[0] for row in rows] == ["slow.1", "failed", "quick"]
    assert rows[1] == ["failed", "5", "s", "ago", "error", "-", "-", "1.00", "s", "ttft", "1", "9", "1", "p0", ">", "-"]
    assert [each["rid"] for each in json.loads(run("explain", "--slowest", "--json")[1])["ended"]] == [
        *("quick", "failed", "slow.1")
    ]
    assert [line.split()[0] for line in run("explain", "--failed", "--last", "1")[1].splitlines()[1:]] == ["failed"]


def test_it_says_that_there_is_nothing_to_list(run, broker):
    listing(broker, [])
    assert run("explain")[1] == "no request has ended yet\n"
    listing(broker, [ended("quick", 0.5)])
    assert run("explain", "--failed")[1] == "no request has ended by an error or its deadline\n"


def requests_in(file):
    return {each["args"]["request"] for each in json.loads(file.read_text())["traceEvents"] if each["ph"] == "X"}


def test_perfetto_writes_a_trace_of_what_is_shown(run, broker, tmp_path):
    fake = listing(broker, [*ENDED, ended("gone", 1.0)])
    file = tmp_path / "trace.json"
    status, out, err = run("explain", "--perfetto", file)
    assert requests_in(file) == {"slow.1", "failed", "quick"} and "3 requests; open it at ui.perfetto.dev" in err
    fake.seen.clear()
    assert run("explain", "r7", "--perfetto", file, "--json")[0] == 0 and fake.types() == ["explain"]
    assert requests_in(file) == {"r7"}
