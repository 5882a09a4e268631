"""tools/compare_api: what it takes from answers, and what it calls a difference."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from click.testing import CliRunner

from tetri.bench import compare_api
from tetri.bench.compare_api import CONTEXT, Found, cases, compared, essence, main

USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
TOP = {"a": -0.5, "b": -1.0}


def completion(text="ab", tokens=("a", "b"), values=(-0.5, -1.0), tops=(TOP, TOP), **more):
    logprobs = {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": [*range(len(tokens))]}
    choice = {"index": 0, "text": text, "finish_reason": "length", "logprobs": logprobs, "stop_reason": None, **more}
    return essence({"choices": [choice], "usage": USAGE})


def test_completions_and_chats_have_one_form():
    row = ["a", -0.5, TOP, None]
    record = {"token": "a", "logprob": -0.500001, "bytes": [97]}
    tops = [{"token": token, "logprob": value, "bytes": []} for token, value in {**TOP, "": -2.0}.items()]
    choice = {"index": 0, "message": {"content": "ab"}, "finish_reason": "stop"}
    body = {"choices": [{**choice, "logprobs": {"content": [{**record, "top_logprobs": tops}]}}], "usage": USAGE}
    assert essence(body) == {"usage": [3, 2, 5], "choices": [{"text": "ab", "end": "stop", "tokens": [row]}]}
    assert completion()["choices"][0]["tokens"] == [["a", -0.5, TOP, 0], ["b", -1.0, TOP, 1]]
    assert essence({"count": 1, "max_model_len": 9, "tokens": [7], "token_strs": None}) == {"count": 1, "tokens": [7]}


def test_log_probabilities_may_differ_by_rounding():
    near = completion(values=(-0.5005, -1.0), tops=({"a": -0.5005, "b": -1.0005}, TOP))
    assert compared({"x": near}, {"x": completion()}) == Found([], [])
    for far in (completion(values=(-0.502, -1.0)), completion(tops=({"a": -0.5, "b": -1.002}, TOP))):
        (line,) = compared({"x": far}, {"x": completion()}).differences
        assert line.startswith("x: token 0, 'a': log probabilities")


def test_of_the_least_likely_tokens_either_may_be_among_the_top():
    other = completion(tops=({"a": -0.5, "c": -1.0005}, TOP))
    assert compared({"x": other}, {"x": completion()}) == Found([], [])
    (line,) = compared({"x": completion(tops=({"a": -0.5, "c": -0.9}, TOP))}, {"x": completion()}).differences
    assert "top" in line


def test_another_token_is_a_tie_where_the_reference_was_undecided():
    close = {"a": -0.5, "b": -0.5005}
    wanted = completion(tops=(close, TOP))
    found = compared({"x": completion("bz", ("b", "z"), tops=(close, TOP))}, {"x": wanted})
    assert found.differences == [] and found.ties == ["x: token 0 is 'b' 0 instead of 'a' 0 (gap 0.0005)"]
    found = compared({"x": completion("bz", ("b", "z"))}, {"x": completion()})
    assert found.ties == [] and found.differences == ["x: token 0 is 'b' 0 instead of 'a' 0 (gap 0.5)"]


@pytest.mark.parametrize(
    "answer",
    [
        completion(text="abc"),
        completion(finish_reason="stop"),
        completion(tokens=("a",), values=(-0.5,), tops=(TOP,)),
        completion() | {"usage": [3, 2, 6]},
        {"status": 400, "message": True},
    ],
)
def test_differences(answer):
    assert len(compared({"x": answer}, {"x": completion()}).differences) == 1
    assert compared({"x": answer}, {}).differences == ["x: only one side has an answer"]


def test_the_questions_have_names_of_their_own_and_50_prompts():
    made = cases("m")
    assert len({case.name for case in made}) == len(made) and {case.body["model"] for case in made} >= {"m", "nobody"}
    prompts = [case.body["prompt"] for case in made if case.name.startswith("completion ")]
    assert len(set(prompts)) == len(prompts) == 50


class Played(BaseHTTPRequestHandler):
    """A server that knows the length of every prompt."""

    def do_GET(self):
        self.answer(200, {"data": [{"id": "m", "max_model_len": CONTEXT}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if body.get("temperature") == -1:
            self.answer(400, {"error": {"message": "no"}})
        else:
            self.answer(200, {"count": len(str(body)), "tokens": []})

    def answer(self, status, body):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 64  # all questions at once; one that finds no place is sent again after a second


@pytest.fixture
def url():
    with Server(("127.0.0.1", 0), Played) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_record_and_compare(url, tmp_path, monkeypatch):
    monkeypatch.setattr(compare_api, "cases", lambda model: cases(model)[-14:])
    answers = tmp_path / "answers.json"
    assert CliRunner().invoke(main, ["--url", url, "--record", str(answers)]).exit_code == 0
    known = json.loads(answers.read_text())
    assert known["wrong temperature"] == {"status": 400, "message": True} and len(known) == 14
    for reference in (["--answers", str(answers)], ["--reference", url]):
        result = CliRunner().invoke(main, ["--url", url, *reference])
        assert (result.exit_code, result.stdout) == (0, "14 answers, 0 differ\n")
    answers.write_text(json.dumps(known | {"wrong n": {"status": 422, "message": True}}))
    result = CliRunner().invoke(main, ["--url", url, "--answers", str(answers), "--json"])
    found = json.loads(result.stdout)
    assert result.exit_code == 1 and len(found["differences"]) == 1 and found["differences"][0].startswith("wrong n: ")


def test_errors_are_one_line(url):
    result = CliRunner().invoke(main, ["--url", url])
    assert result.exit_code == 2 and "give one of --reference, --answers and --record" in result.stderr
    result = CliRunner().invoke(main, ["--url", "http://127.0.0.1:9", "--reference", url])
    assert result.exit_code == 1 and result.stderr.splitlines()[-1].startswith("compare_api: ")
