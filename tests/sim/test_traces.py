"""Requests from files and from chance."""

import os
from functools import partial
from itertools import cycle
from pathlib import Path
from random import Random
from statistics import fmean, pstdev
from threading import Thread

import pytest

from tetri.sim.traces import FORMATS, Arrival, TokenCounts, TraceError, drawn, replayed, with_deadline

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
    found = replayed(trace(text), **how)
    assert list(found.arrivals) == right
    assert (found.requests, found.notes) == (len(right), [])


MOONCAKE = '{"timestamp": 2000, "input_length": 10, "output_length": 1, "hash_ids": [0]}\n'
MOONCAKE += '{"timestamp": 3500, "input_length": 20, "output_length": 2, "hash_ids": []}\n\n'
BAILIAN = '{"chat_id": 1, "timestamp": 2.0, "input_length": 10, "output_length": 1, "turn": 1}\n'
BAILIAN += '{"chat_id": 2, "timestamp": 3.5, "input_length": 20, "output_length": 2, "turn": 1}\n'
SPLITWISE = "request_id,request_type,application_id,arrival_timestamp,batch_size,prompt_size,token_size\n"


@pytest.mark.parametrize(
    "text",
    [
        HEAD + "2024-05-10 00:00:00.009930+00:00,10,1\n2024-05-10 00:00:01.509930+00:00,20,2\n",
        "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n2024-10-15 00:00:02,0,10,1\n2024-10-15 00:00:03.5,1,20,2\n",
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "2,ChatGPT,10,1,11,Conversation log\n3.5,GPT-4,20,2,22,API log\n",
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "2,,0.5,ChatGPT,10.0,1.0,11,API log\n3.5,7,0.5,GPT-4,20.0,2.0,22,API log\n",
        "arrived_at,num_prefill_tokens,num_decode_tokens\n2.0,10,1\n3.5,20,2\n",
        '"", arrived_at, num_prefill_tokens, num_decode_tokens\n0,2.0,10,1\n1,3.5,20,2\n',
        SPLITWISE + "0,2,0,2.0,1,10,1\n1,2,0,3.5,1,20,2\n",
        MOONCAKE,
        BAILIAN,
    ],
    ids=["Azure 2024", "images", "BurstGPT", "BurstGPT 2", "vidur", "pandas", "splitwise", "Mooncake", "Bailian"],
)
def test_the_formats_that_people_have_are_told_by_their_columns(trace, text):
    assert list(replayed(trace(text)).arrivals) == [Arrival(0.0, 10, 1), Arrival(1.5, 20, 2)]


def test_every_format_is_in_the_documentation():
    text = (Path(__file__).parent.parent.parent / "docs" / "simulator.md").read_text()
    assert [each.name for each in FORMATS if f"| {each.name} | `{'`, `'.join(each.columns)}` |" not in text] == []


VIDUR = "arrived_at,num_prefill_tokens,num_decode_tokens\n"


def test_rows_without_output_are_skipped_and_counted_and_unsorted_ones_are_sorted(trace):
    path = trace(VIDUR + "5,30,3\n1,10,0\n3,10,1\n4,20,2\n0,0,5\n")
    found = replayed(path, requests=4)
    assert list(found.arrivals) == [Arrival(at, *each) for at, each in zip((0, 1, 2, 3), cycle(THREE), strict=False)]
    skipped, late = "rows skipped for 0 prompt or output tokens: 2", "rows earlier than the one before: 1; "
    assert found.notes == [skipped, late + "the 3 requests are sorted by time"]
    assert [each.prompt for each in replayed(path, requests=2).arrivals] == [10, 30]  # of those that are read


THREE = [(10, 1), (20, 2), (30, 3)]


def test_it_is_read_no_further_than_it_is_used(trace):
    assert [each.prompt for each in replayed(trace(ONE_LINE + "broken\n"), requests=1).arrivals] == [10]


def test_a_pipe_is_read_once_and_repeated(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = Thread(target=(tmp_path / "pipe").write_text, args=(MOONCAKE,))
    writer.start()
    assert [each.prompt for each in replayed(tmp_path / "pipe", requests=5).arrivals] == [10, 20, 10, 20, 10]
    writer.join()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "csv:1: unknown columns '': a trace has TIMESTAMP,ContextTokens,GeneratedTokens (Azure 2023, 2024); "),
        ("a,b\n", "csv:1: unknown columns 'a,b': a trace has"),
        ('{"timestamp": 1}\n', "csv:1: unknown columns '{\"timestamp\": 1}': a trace has"),
        ("{\n", "csv:1: unknown columns '{': a trace has"),
        (HEAD, "the trace has no requests"),
        (HEAD + "2023-11-16 00:00:00,10,0\n", "no requests; rows skipped for 0 prompt or output tokens: 1"),
        (HEAD + "2023-11-16 00:00:00,10,1\n2023-11-16 00:00:00,10\n", "csv:3: must have TIMESTAMP,ContextTokens,"),
        (HEAD + "noon,10,1\n", "csv:2: must have TIMESTAMP,ContextTokens,GeneratedTokens: a time and two numbers of"),
        (HEAD + "2023-11-16 00:00:00x,10,1\n", "got '2023-11-16 00:00:00x,10,1'"),
        (HEAD + "2023-11-16 00:00:00,-1,1\n", "csv:2: must have"),
        (HEAD + "2023-11-16 00:00:00,1.5,1\n", "csv:2: must have"),
        (HEAD + "x" * 500 + "\n", "..."),
        (HEAD + "2023-11-16 00:00:00,99999999999,1\n", "two numbers of tokens from 0 to 10000000"),
        (HEAD + "1900-01-01 00:00:00,1,1\n2023-11-16 00:00:00,1,1\n", "csv:3: 3.90908e+09 s from the first"),
        (VIDUR + "nan,1,1\n", "csv:2: must have arrived_at,num_prefill_tokens,num_decode_tokens: a time"),
        (MOONCAKE + "{}\n", "csv:4: must have timestamp,input_length,output_length: a time and two numbers"),
        (MOONCAKE + '{"timestamp": 1, "input_length": null, "output_length": 1}', "csv:4: must have timestamp"),
        (MOONCAKE + f'{{"timestamp": 1, "input_length": 1{"0" * 400}, "output_length": 1}}', "csv:4: must have time"),
        (MOONCAKE + "[1, 2, 3]\n", "csv:4: must have timestamp"),
        (MOONCAKE + "half of {\n", "got 'half of {"),
    ],
)
def test_a_wrong_trace_is_one_line_that_names_the_line(trace, text, says):
    path = trace(text)
    with pytest.raises(TraceError) as error:
        replayed(path)
    assert says in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 700


def test_a_trace_that_is_no_text_or_not_there(tmp_path):
    (tmp_path / "trace.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TraceError, match="not a text file"):
        replayed(tmp_path / "trace.csv")
    with pytest.raises(TraceError, match="cannot be read: No such file"):
        replayed(tmp_path / "other.csv")


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


@pytest.mark.parametrize("text", ["512", "100-103", "lognormal:600:0.8", "lognormal:600:0"])
def test_lengths_that_are_spread_have_the_distribution_of_those_that_are_drawn(text):
    counts, rng = TokenCounts.parsed(text), Random(0)
    spread, drawn_ones = counts.spread(4000), sorted(counts.draw(rng) for _ in range(4000))
    assert spread == sorted(spread) and len(spread) == 4000
    for share in (0, 0.1, 0.5, 0.9):
        assert spread[int(share * 4000) + 20] == pytest.approx(drawn_ones[int(share * 4000) + 20], rel=0.08)
    if text == "100-103":
        assert [spread.count(tokens) for tokens in range(100, 104)] == [1000] * 4
