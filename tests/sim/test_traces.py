"""Requests from files and from chance."""

from functools import partial
from itertools import cycle
from statistics import fmean, pstdev

import pytest

from tetri.sim.traces import Arrival, TokenCounts, TraceError, drawn, replayed, with_deadline

HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


@pytest.fixture
def trace(tmp_path):
    def write(text):
        path = tmp_path / "trace.csv"
        path.write_text(text, encoding="utf-8")
        return path

    return write


GOOD = HEAD + "2023-11-16 23:59:59.5,10,1\n2023-11-17 00:00:00.5000000,20,2\n2023-11-17 00:00:03.5,30,3\n"


ONE_LINE = HEAD + "2023-11-16 00:00:00,10,1\n"


@pytest.mark.parametrize(
    ("text", "how", "times"),
    [
        (GOOD, {}, [0.0, 1.0, 4.0]),
        *((text, {}, [0.0, 1.0, 4.0]) for text in ("\ufeff" + GOOD, GOOD.replace("\n", "\r\n"), GOOD + "\n\n")),
        (GOOD.replace(".5,", ".5+00:00,"), {}, [0.0, 1.0, 4.0]),
        (GOOD, {"speedup": 4.0}, [0.0, 0.25, 1.0]),
        (GOOD, {"requests": 2}, [0.0, 1.0]),
        (GOOD, {"requests": 8}, [0.0, 1.0, 4.0, 6.0, 7.0, 10.0, 12.0, 13.0]),  # repeated end to end
        (ONE_LINE, {"requests": 3}, [0.0, 1.0, 2.0]),  # every second
    ],
)
def test_a_trace_starts_at_time_0_and_is_repeated_as_often_as_needed(trace, text, how, times):
    lengths = [(10, 1), (20, 2), (30, 3)] if text != ONE_LINE else [(10, 1)]
    right = [Arrival(at_s, *each) for at_s, each in zip(times, cycle(lengths), strict=False)]
    assert list(replayed(trace(text), **how)) == right


def test_it_is_read_no_further_than_it_is_used(trace):
    assert next(replayed(trace(ONE_LINE + "broken\n"))).prompt == 10


def test_a_repeated_trace_is_read_once(trace):
    path = trace(GOOD)
    found = replayed(path, requests=8)
    assert next(found).prompt == 10
    path.unlink()
    assert [each.prompt for each in found] == [20, 30, 10, 20, 30, 10, 20]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "csv:1: the first line must be"),
        ("a,b\n", "csv:1: the first line must be"),
        (HEAD, "the trace has no requests"),
        (HEAD + "2023-11-16 00:00:00,10,1\n2023-11-16 00:00:00,10\n", "csv:3: must be a time and two numbers"),
        (HEAD + "noon,10,1\n", "csv:2: must be a time and two numbers"),
        (HEAD + "2023-11-16 00:00:00x,10,1\n", "csv:2: must be a time"),
        (HEAD + "2023-11-16 00:00:00,-1,1\n", "csv:2: must be a time"),
        (HEAD + "2023-11-16 00:00:00,10,0\n", "csv:2: must be a time"),
        (HEAD + "2023-11-16 00:00:01,10,1\n2023-11-16 00:00:00,10,1\n", "csv:3: 2023-11-16 00:00:00 is earlier than"),
        (HEAD + "x" * 500 + "\n", "..."),
        (HEAD + "2023-11-16 00:00:00,99999999999,1\n", "two numbers of tokens from 1 to 10000000"),
        (HEAD + "1900-01-01 00:00:00,1,1\n2023-11-16 00:00:00,1,1\n", "csv:3: 3.90908e+09 s after the first"),
    ],
)
def test_a_wrong_trace_is_one_line_that_names_the_line(trace, text, says):
    path = trace(text)
    with pytest.raises(TraceError) as error:
        list(replayed(path))
    assert says in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 300


def test_a_trace_that_is_no_text_or_not_there(tmp_path):
    (tmp_path / "trace.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TraceError, match="not a CSV file"):
        list(replayed(tmp_path / "trace.csv"))
    with pytest.raises(TraceError, match="cannot be read: No such file"):
        list(replayed(tmp_path / "other.csv"))


FIXED = TokenCounts.parsed("7")
NAN, INF = float("nan"), float("inf")
drawing = partial(drawn, requests=1, prompt=FIXED, output=FIXED, seed=1)


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 2.0])
def test_drawn_requests_have_the_rate_and_the_burstiness_asked_for(burstiness):
    made = [each.at_s for each in drawn(20_000, FIXED, FIXED, seed=1, rate=5.0, burstiness=burstiness)]
    gaps = [after - before for before, after in zip(made, made[1:], strict=False)]
    assert made == sorted(made)
    assert fmean(gaps) == pytest.approx(0.2, rel=0.05)
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(burstiness, rel=0.05)


def test_lengths_have_the_distribution_asked_for():
    def lengths(seed):
        return [each.prompt for each in drawn(5000, TokenCounts.parsed("3-5"), FIXED, seed)]

    assert {*lengths(1)} == {3, 4, 5} and fmean(lengths(1)) == pytest.approx(4.0, abs=0.1)
    assert lengths(1) == lengths(1) != lengths(2)
    lognormal = sorted(each.output for each in drawn(5001, FIXED, TokenCounts.parsed("lognormal:100:0.5"), seed=1))
    assert lognormal[2500] == pytest.approx(100, rel=0.05)
    assert lognormal[4207] == pytest.approx(100 * 2.718281828**0.5, rel=0.05)  # one standard deviation above
    wild = {each.prompt for each in drawn(1000, TokenCounts.parsed("lognormal:500:1000"), FIXED, seed=1)}
    assert (min(wild), max(wild)) == (1, 10_000_000)
    assert all(each.prompt >= 1 for each in drawn(1000, TokenCounts.parsed("lognormal:1:3"), FIXED, seed=1))


WRONG = ("", "0", "-3", "x", "5-3", "1.5", "lognormal:1", "lognormal:0:1", "lognormal:5:nan", "1-99999999999")


@pytest.mark.parametrize(
    ("make", "change", "says"),
    [
        *((TokenCounts.parsed, {"text": text}, "lengths must be N, LOW-HIGH") for text in WRONG),
        *((replayed, {"path": "any", "speedup": wrong}, "speedup must be above 0") for wrong in (0.0, -1.0, NAN, INF)),
        (drawing, {"requests": 0}, "number of requests"),
        (drawing, {"rate": -1.0}, "rate must be at least 0"),
        (drawing, {"rate": INF}, "rate must be"),
        (drawing, {"rate": 1e-300}, "at a rate of 1e-300 per second 1 requests take more than 1e.09 s"),
        (drawing, {"requests": 10**12}, "number of requests must be at least 1 and at most 100000000"),
        (drawing, {"burstiness": 0.0}, "burstiness must be from 0.01"),
        (drawing, {"burstiness": 1e300}, "burstiness must be from 0.01 to 100"),
        (with_deadline, {"arrivals": [], "deadline_s": 0.0}, "deadline must be above 0"),
    ],
)
def test_wrong_numbers(make, change, says):
    with pytest.raises(TraceError, match=says):
        make(**change)


def test_deadlines_are_given_to_all():
    assert list(with_deadline(drawn(2, FIXED, FIXED, 1), 3.0)) == [Arrival(0.0, 7, 7, 3.0)] * 2
