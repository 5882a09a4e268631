import json

import pytest

from tetri.bench.compare.load import Answer, Load, capacity, headers_of, question
from tetri.request import Slo


def questions(count, output=4, every_s=0.0):
    return [question(every_s * number, "m", [7] * (number + 1), output) for number in range(count)]


def test_a_question_asks_for_exactly_so_many_tokens():
    body = json.loads(question(1.5, "m", [5, 6], 9).body)
    assert body == {
        "model": "m", "prompt": [5, 6], "max_tokens": 9, "ignore_eos": True, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip


def test_an_answer_is_timed(serve):
    played, url = serve()
    played.first_s, played.steps_s = 0.1, 0.05
    load = Load([url], "least", {"X-SLO-TTFT-Ms": "5"})
    (answer,) = load.at_times(questions(1))
    assert (answer.error, answer.prompt, answer.output, answer.server) == ("", 1, 4, 0)
    assert answer.ttft_s >= 0.1 and answer.jct_s >= 0.25
    assert answer.tpot_s == (answer.jct_s - answer.ttft_s) / 3
    assert len(load.gaps_s) == 3 and answer.longest_s == max(load.gaps_s) and load.cpu_s > 0
    assert played.headers[0]["X-SLO-TTFT-Ms"] == "5"


def test_questions_are_sent_at_their_times_whatever_became_of_others(serve):
    played, url = serve()
    played.hold = lambda: len(played.bodies) < 4
    answers = Load([url], "least").at_times(questions(4, every_s=0.1))
    assert played.most == 4
    assert [answer.prompt for answer in answers] == [1, 2, 3, 4]  # in their order
    for number, answer in enumerate(answers):
        assert answer.sent_s >= 0.1 * number


def test_so_many_are_kept_in_flight(serve):
    played, url = serve()
    played.hold = lambda: len(played.bodies) < 5
    answers = Load([url], "least").in_flight(questions(20), 5)
    assert played.most == 5 and len(answers) == len(played.bodies) == 20


def test_round_robin_asks_each_in_turn(serve):
    (one, first), (two, second) = serve(), serve()
    answers = Load([first, second], "rr").at_times(questions(4))
    assert [answer.server for answer in answers] == [0, 1, 0, 1] and len(one.bodies) == len(two.bodies) == 2


def test_least_outstanding_avoids_the_slow_one(serve):
    (slow, first), (fast, second) = serve(), serve()
    slow.hold = lambda: len(fast.bodies) < 5
    Load([first, second], "least").in_flight(questions(6), 2)  # the next one goes where one has ended
    assert (len(slow.bodies), len(fast.bodies)) == (1, 5)


@pytest.mark.parametrize(
    ("problem", "says"),
    [
        ("status", 'status 503: {"error": {"message": "no"}}'),
        ("error", "ended with {'message': 'it broke'}"),
        ("short", "3 tokens instead of 4"),
        ("garbage", "DecodeError: "),
        ("cut", "ClientPayloadError: "),
    ],
)
def test_what_went_wrong_is_the_answers_error(serve, problem, says):
    played, url = serve()
    played.fail = lambda body: problem if len(body["prompt"]) == 2 else None
    answers = Load([url], "least").at_times(questions(3))
    assert [answer.error.startswith(says) for answer in answers] == [False, True, False], answers
    assert [bool(answer.error) for answer in answers] == [False, True, False]


def test_a_server_that_is_not_there_is_an_error_of_each():
    answers = Load(["http://127.0.0.1:9"], "least").at_times(questions(2))
    assert all(answer.error.startswith("ClientConnectorError") for answer in answers)


@pytest.mark.parametrize(
    ("ttft", "jct", "output", "error", "keeps"),
    [
        (1.0, 3.0, 11, "", True),
        (1.1, 3.0, 11, "", False),
        (1.0, 3.1, 11, "", False),
        (1.0, 1.0, 1, "", True),  # no second token
        (1.0, 3.0, 11, "cut", False),
    ],
)
def test_whether_a_request_kept_its_limits(ttft, jct, output, error, keeps):
    assert Answer(0.0, ttft, jct, 5, output, error=error).keeps(Slo(ttft_s=1.0, tpot_s=0.2)) is keeps


def test_without_limits_every_answer_keeps_them():
    answer = Answer(0.0, 9.0, 99.0, 5, 3)
    assert answer.keeps(Slo()) and not answer.keeps(Slo(ttft_s=1.0)) and not answer.keeps(Slo(tpot_s=1.0))
    assert not Answer(0.0, 9.0, 99.0, 5, 3, error="cut").keeps(Slo())


def test_limits_are_named_by_headers():
    assert headers_of(Slo(ttft_s=1.5, tpot_s=0.05)) == {"X-SLO-TTFT-Ms": "1500.000", "X-SLO-TPOT-Ms": "50.000"}
    assert headers_of(Slo()) == {}


def test_the_capacity_counts_while_all_are_in_flight():
    """Two a second: request i is sent when i - 4 ends."""
    answers = [Answer(max(0.0, (number - 3) / 2), 0.1, 0.0, 1, 1) for number in range(20)]
    for number, answer in enumerate(answers):
        answer.jct_s = (number + 1) / 2 - answer.sent_s
    assert capacity(answers, 4) == pytest.approx(2.0)
    assert capacity(answers[:4], 4) == 0.0
