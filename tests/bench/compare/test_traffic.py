import json

import pytest

from tetri.bench.compare.traffic import SESSION, Workload, names
from tetri.sim.traces import TraceError

CONTEXT, VOCABULARY = 2048, 1000


def workload(name="Mixed", **more):
    return Workload(name, CONTEXT, **more)


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def row(at_ms, prompt, output, **more):
    return {"timestamp": at_ms, "input_length": prompt, "output_length": output, **more}


@pytest.mark.parametrize("name", names())
def test_all_requests_fit_in_order_at_one_per_second(name):
    drawn = workload(name).draw(200, 3)
    times = [each.at for each in drawn]
    assert len(drawn) == 200 and times == sorted(times)
    assert (times[-1] - (0 if name != SESSION else times[0])) / 200 == pytest.approx(1, abs=0.01)
    assert all(each.prompt >= 1 and each.output >= 1 and each.prompt + each.output <= CONTEXT for each in drawn)


def test_the_same_seed_draws_the_same_and_another_one_others():
    assert workload().draw(20, 1) == workload().draw(20, 1) != workload().draw(20, 2)


def test_the_classes_differ_in_what_they_are_named_after():
    def mean(name, part):
        drawn = workload(name).draw(300, 0)
        return sum(getattr(each, part) for each in drawn) / len(drawn)

    assert mean("HPLD", "prompt") > 512 > 5 * mean("LPHD", "prompt")
    assert mean("LPHD", "output") > 128 > mean("HPLD", "output")
    assert mean("LPLD", "prompt") < workload("LPLD").p90_prompt < mean("HPLD", "prompt") < workload("HPLD").p90_prompt


def test_tokens_are_the_same_for_the_same_salt_only():
    one, other = workload().draw(2, 1)
    ids = one.ids("a", VOCABULARY)
    assert ids == one.ids("a", VOCABULARY) and len(ids) == one.prompt and 256 <= min(ids) <= max(ids) < VOCABULARY
    assert ids[:16] != one.ids("b", VOCABULARY)[:16] and ids[:16] != other.ids("a", VOCABULARY)[:16]
    assert len(one.ids("a", 100)) == one.prompt  # a vocabulary without tokens that are not special


def test_a_turn_of_a_session_repeats_what_was_said_before():
    drawn = workload(SESSION).draw(200, 0)
    later = [(one, two) for one in drawn for two in drawn if two.parts[: len(one.parts)] == one.parts and two != one]
    assert len(later) > 100
    for one, two in later:
        assert two.at > one.at
        assert two.parts[len(one.parts)][1] == one.output  # its answer
        assert two.ids("x", VOCABULARY)[: one.prompt] == one.ids("x", VOCABULARY)


def test_an_excerpt_of_a_trace_keeps_its_order_and_the_ratios_of_its_times(tmp_path):
    trace = written(tmp_path / "t.jsonl", [row(1000 * i * i, 10 + i, 5) for i in range(50)])
    drawn = workload("t", trace=trace).draw(10, 4)
    prompts = [each.prompt for each in drawn]
    assert prompts == [*range(prompts[0], prompts[0] + 10)]
    assert (drawn[0].at, drawn[-1].at) == (0, pytest.approx(9))
    squares = [(prompt - 10) ** 2 for prompt in prompts]
    share = (squares[1] - squares[0]) / (squares[-1] - squares[0])
    assert drawn[1].at / drawn[-1].at == pytest.approx(share)


def test_blocks_with_the_same_hash_are_the_same_tokens(tmp_path):
    rows = [row(0, 1100, 20, hash_ids=[1, 2, 3]), row(0, 0, 9, hash_ids=[7]), row(10, 1030, 30, hash_ids=[1, 2, 4])]
    trace = written(tmp_path / "t.jsonl", rows)
    one, two = workload("t", trace=trace).draw(2, 0)
    first, second = one.ids("s", VOCABULARY), two.ids("s", VOCABULARY)
    assert (len(first), len(second)) == (1100, 1030)
    assert first[:1024] == second[:1024] and first[1024:1030] != second[1024:]


def test_lengths_are_divided_and_blocks_with_them(tmp_path):
    rows = [row(0, 1100, 20, hash_ids=[1, 2, 3]), row(10, 1030, 3, hash_ids=[1, 2, 4])]
    trace = written(tmp_path / "t.jsonl", rows)
    one, two = workload("t", trace=trace, shrink=8).draw(2, 0)
    assert [(one.prompt, one.output), (two.prompt, two.output)] == [(137, 2), (128, 1)]
    assert one.ids("s", VOCABULARY)[:128] == two.ids("s", VOCABULARY)


def test_what_a_trace_cannot_give_is_said(tmp_path):
    trace = written(tmp_path / "t.jsonl", [row(i, 3000, 5) for i in range(4)])
    with pytest.raises(TraceError, match="no request fits into 2048 tokens: divide its lengths"):
        workload("t", trace=trace).draw(2, 0)
    with pytest.raises(TraceError, match="has 4 requests that fit, fewer than 5"):
        workload("t", trace=trace, shrink=2).draw(5, 0)
