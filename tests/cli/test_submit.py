"""tetri-cli submit against a fake broker: what goes to stdout, what to stderr, and the exit status."""

import json

import pytest
from fake_broker import accepted, choices, delta, done, likely

from tests.cli.fakes import environment, on_terminal, refuse, start


def test_the_answer_alone_goes_to_stdout(run, broker):
    fake = broker()
    assert run("submit", "hi") == (0, "one two three\n", "")
    assert run("submit", "hi", "--no-stream") == (0, "one two three\n", "")
    assert fake.seen[0]["sampling"] == {} and fake.seen[0]["prompt"] == "hi"


def test_options_reach_the_broker(run, broker):
    fake = broker()
    options = "--max-tokens 3 --temperature 0.5 --top-p 0.9 --top-k 4 --min-p 0.1 --seed 7 --stop a --stop b"
    run("submit", "hi", "--chat", "--deadline", "5", "--ttft", "0.5", "--tpot", "0.05", *options.split())
    assert fake.seen[0]["messages"] == [{"role": "user", "content": "hi"}] and fake.seen[0]["deadline_s"] == 5.0
    assert fake.seen[0]["slo"] == {"ttft_s": 0.5, "tpot_s": 0.05}
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
    wanted += ["choice", "logprobs", "slo", "slo_result"]
    assert list(found) == wanted and found["slo"] == {"ttft_s": None, "tpot_s": None}
    assert found["text"] == "one two three" and found["receipt"]["prefill_instance"] is None


def test_several_answers(run, broker):
    fake = broker(choices)
    status, out, err = run("submit", "hi", "-n", "2", "--temperature", "1")
    assert (status, err) == (0, "") and fake.seen[0]["n"] == 2
    assert out == "choice 0: length, 3 tokens\n0one 0two 0three\nchoice 1: length, 3 tokens\n1one 1two 1three\n"
    found = json.loads(run("submit", "hi", "-n", "2", "--temperature", "1", "--json")[1])
    assert [each["text"] for each in found["choices"]] == ["0one 0two 0three", "1one 1two 1three"]
    assert "--stream shows one answer" in run("submit", "hi", "-n", "2", "--stream")[2]


@pytest.mark.parametrize("more", [[], ["--no-stream"]])
def test_log_probabilities(run, broker, more):
    def reply(message):
        ids = [likely(0, 0), likely(1)]
        return [accepted(message), *({**delta(i), "ids": [ids[i]]} for i in range(2)), done(tokens=2)]

    fake = broker(reply)
    out = run("submit", "hi", "--logprobs", "2", *more)[1]
    assert out == "one two \ntoken 10: -0.5000\ntoken 11: -1.0000 (likeliest: 11 -1.0000, 12 -inf)\n"
    assert fake.seen[0]["sampling"] == {"logprobs": 2}


def test_the_worst_end_of_a_choice_is_the_exit_status(run, broker):
    ends = [done(reason=reason, tokens=0, choice=choice) for choice, reason in enumerate(("stop", "deadline"))]
    broker(lambda message: [accepted(message), *ends])
    status, _, err = run("submit", "hi", "-n", "2", "--temperature", "1")
    assert (status, err) == (1, "tetri-cli: the deadline passed\n")


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


TEXT = "é 😀 \x1b[2J\r\u202eend"
LATIN_1 = {"PYTHONIOENCODING": "latin-1"}
ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def says(message):
    """TEXT in two pieces; the cut is inside its escape sequence."""
    return [accepted(message), delta(0, word=TEXT[:5]), delta(1, word=TEXT[5:]), done(tokens=2)]


@pytest.mark.parametrize(
    ("settings", "arrives"),
    [
        ({"PYTHONIOENCODING": "utf-8"}, "é 😀 \\x1b[2J\\x0d\\u202eend\n".encode()),
        (LATIN_1, b"\xe9 \\U0001f600 \\x1b[2J\\x0d\\u202eend\n"),
        (ASCII, b"\\xe9 \\U0001f600 \\x1b[2J\\x0d\\u202eend\n"),
    ],
)
def test_a_terminal_shows_what_it_can_and_obeys_nothing(broker, settings, arrives):
    broker(says)
    assert on_terminal("submit", "hi", **settings) == (0, arrives)


def test_a_terminal_sends_what_is_typed_in_its_encoding(broker):
    fake = broker()
    assert on_terminal("submit", "-", typed=b"caf\xe9\n\x04", **LATIN_1) == (0, b"one two three\n")
    assert fake.seen[0]["prompt"] == "café"


@pytest.mark.parametrize("settings", [LATIN_1, ASCII])
def test_a_pipe_gets_the_text_in_utf_8_and_json_in_ascii(broker, settings):
    broker(says)
    plain, in_json = (start("submit", "hi", *more, env=environment(**settings)) for more in ([], ["--json"]))
    assert plain.communicate(timeout=60) == (f"{TEXT}\n".encode(), b"")
    out, err = in_json.communicate(timeout=60)
    assert (json.loads(out.decode("ascii"))["text"], err) == (TEXT, b"")


def test_a_prompt_that_the_locale_cannot_decode_is_read_as_utf_8(broker):
    fake = broker()
    prompt, wrong = (start("submit", text, env=environment(**ASCII)) for text in ("é 😀".encode(), b"\xff"))
    assert prompt.communicate(timeout=60) == (b"one two three\n", b"")
    assert fake.seen[0]["prompt"] == "é 😀"
    assert wrong.communicate(timeout=60) == (b"", b"tetri-cli: 'TEXT' is not UTF-8 (see tetri-cli submit --help)\n")
