"""tetri-cli submit against a fake broker: what goes to stdout, what to stderr, and the exit status."""

import json

import pytest
from fake_broker import accepted, delta, done

from tests.cli.fakes import refuse


def test_the_answer_alone_goes_to_stdout(run, broker):
    fake = broker()
    assert run("submit", "hi") == (0, "one two three\n", "")
    assert run("submit", "hi", "--no-stream") == (0, "one two three\n", "")
    assert fake.seen[0]["sampling"] == {} and fake.seen[0]["prompt"] == "hi"


def test_options_reach_the_broker(run, broker):
    fake = broker()
    options = "--max-tokens 3 --temperature 0.5 --top-p 0.9 --top-k 4 --min-p 0.1 --seed 7 --stop a --stop b"
    run("submit", "hi", "--chat", "--deadline", "5", *options.split())
    assert fake.seen[0]["messages"] == [{"role": "user", "content": "hi"}] and fake.seen[0]["deadline_s"] == 5.0
    assert fake.seen[0]["sampling"] == {
        **{"max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 4, "min_p": 0.1, "seed": 7},
        "stop": ["a", "b"],
    }


def test_json_is_one_object(run, broker):
    broker()
    status, out, err = run("submit", "hi", "--json")
    found = json.loads(out)
    assert (status, err, out.count("\n")) == (0, "", 1)
    wanted = ["rid", "text", "token_ids", "finish_reason", "usage", "timeline", "ttft_s", "jct_s", "receipt"]
    assert list(found) == wanted
    assert found["text"] == "one two three" and found["receipt"]["prefill_instance"] is None


def fail(message):
    return [accepted(message), done(reason="error", tokens=0, error="d0 was lost")]


def late(message):
    return [accepted(message), delta(0), done(reason="deadline", tokens=1)]


@pytest.mark.parametrize(
    ("reply", "status", "says"),
    [(refuse, 1, "the prompt is empty"), (fail, 1, "d0 was lost"), (late, 1, "the deadline passed")],
)
def test_a_request_that_fails(run, broker, reply, status, says):
    broker(reply)
    found, _, err = run("submit", "hi")
    assert (found, err) == (status, f"tetri-cli: {says}\n")
