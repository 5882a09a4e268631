"""What chunks and steps cost."""

import math
from dataclasses import fields, replace
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tetri import cost
from tetri.cost import CorrectedCost, Cost, CostError
from tetri.engine_request import Span

MEASURED = Cost(
    prefill=((10.0, 1.0), (20.0, 1.5), (40.0, 3.5)),
    decode=((1.0, 0.1), (3.0, 0.2)),
    prefill_start_s=0.01,
    decode_context_s=0.001,
)


@pytest.mark.parametrize("tokens, seconds", [(1, 1.0), (10, 1.0), (15, 1.25), (20, 1.5), (30, 2.5), (60, 5.5)])
def test_a_chunk_is_read_off_the_curve(tokens, seconds):
    assert MEASURED.chunk_s([Span("a", 0, tokens)]) == pytest.approx(seconds)


def test_a_chunk_costs_more_the_later_it_starts_and_spans_add_up():
    assert MEASURED.chunk_s([Span("a", 100, 110)]) == pytest.approx(1.0 + 0.01 * 10 * 100)
    assert MEASURED.chunk_s([Span("a", 0, 5), Span("b", 0, 10)]) == pytest.approx(1.25)
    nothing = [MEASURED.chunk_s([]), MEASURED.prompt_s(100, 100, 32), MEASURED.prompt_s(90, 100, 32)]
    assert [*nothing, Cost().chunk_s([Span("a", 0, 900)]), Cost().decode_s(9, 900)] == [0.0] * 5


@pytest.mark.parametrize("batch, seconds", [(1, 0.1), (2, 0.15), (3, 0.2), (5, 0.3)])
def test_a_decode_step_costs_by_batch_and_context(batch, seconds):
    assert MEASURED.decode_s(batch, 50) == pytest.approx(seconds + 0.05)
    assert MEASURED.decode_s(0, 50) == 0.0


@st.composite
def curves(draw):
    steps = draw(st.lists(st.tuples(st.integers(1, 500), st.floats(0, 2)), max_size=5))
    first = (draw(st.integers(0, 50)), draw(st.floats(0, 2)))
    xs, seconds = (accumulate(each) for each in zip(first, *steps, strict=True))
    return tuple((float(x), y) for x, y in zip(xs, seconds, strict=True))


costs = st.builds(
    Cost,
    curves(),
    curves(),
    st.floats(0, 1e-3),
    st.floats(0, 1e-3),
    kv_tokens=st.integers(0, 1 << 40),
    predictor_slowdown=st.floats(1, 3),
)
small = st.integers(0, 300)


@settings(deadline=None, derandomize=True)
@given(costs, small, small, st.integers(1, 64))
def test_a_prompt_costs_the_sum_of_its_chunks(table, done, rest, chunk_tokens):
    tokens, total, at = done + rest, 0.0, done
    while at < tokens:
        stop = min(at + chunk_tokens, tokens)
        total += table.chunk_s([Span("a", at, stop)])
        at = stop
    assert table.prompt_s(tokens, done, chunk_tokens) == pytest.approx(total, rel=1e-9, abs=1e-9)


def test_a_prompt_has_its_part_of_chunks_that_others_fill_up():
    table = Cost(prefill=((0.0, 0.1), (100.0, 0.3)), prefill_start_s=1e-5)
    assert table.shared_s(50, 100) == pytest.approx(0.15)  # alone 0.2
    assert table.shared_s(250, 100) == pytest.approx(table.prompt_s(200, 0, 100) + 0.15)
    assert table.shared_s(200, 100) == table.prompt_s(200, 0, 100)
    assert Cost().shared_s(250, 100) == 0.0


@settings(deadline=None, derandomize=True)
@given(costs, st.integers(0, 40), small, st.integers(0, 30))
def test_a_run_of_decode_steps_costs_the_sum_of_them(table, batch, context, steps):
    total = sum(table.decode_s(batch, context + batch * i) for i in range(steps))
    assert table.decode_run_s(batch, context, steps) == pytest.approx(total, rel=1e-9, abs=1e-9)


@settings(deadline=None, derandomize=True)
@given(costs, st.integers(1, 5000), st.integers(0, 5000), st.integers(0, 5000))
def test_more_work_never_takes_less_time_and_none_takes_less_than_none(table, size, more, before):
    """Also far beyond the last measured point, where the line of the last two goes on."""
    less = [Span("a", before, before + size)], size, before
    most = [Span("a", before, before + size + more)], size + more, before
    pairs = [
        (table.chunk_s(less[0]), table.chunk_s(most[0])),
        (table.decode_s(*less[1:]), table.decode_s(*most[1:])),
        (table.step_s(*less), table.step_s(*most)),
        (table.prompt_s(size, 0, 512), table.prompt_s(size, 0, 512) + table.chunk_s(less[0])),
        (table.decode_s(size, before), table.step_s(*less)),
        (table.chunk_s(less[0]), table.step_s(*less)),
    ]
    for smaller, larger in pairs:
        assert -1e-9 <= smaller <= larger * (1 + 1e-9) + 1e-9


@settings(deadline=None, derandomize=True)
@given(costs, st.text(st.characters(exclude_categories=["Cs"])))
def test_a_table_that_is_written_reads_back_equal(tmp_path_factory, table, source):
    table = replace(table, source=source)
    path = tmp_path_factory.getbasetemp() / "written.toml"
    comments = ["made for a test", "", "[not a section]", "a\nprefill = 3\r= 4"]
    path.write_text(cost.dump(table, comments), encoding="utf-8")
    assert cost.load(path) == table
    assert path.read_text(encoding="utf-8").startswith("# made for a test\n#\n# [not a section]\n")


def test_a_table_is_read(tmp_path):
    path = tmp_path / "table.toml"
    path.write_text("prefill = [[1, 0.5]]\ndecode = [[1, 0.1], [2, 0.2]]\ndecode_context_s = 1\n")
    assert cost.load(path) == cost.load(str(path)) == Cost(((1.0, 0.5),), ((1.0, 0.1), (2.0, 0.2)), 0.0, 1.0)


@pytest.mark.parametrize("path", sorted(cost.TABLES.glob("*.toml")), ids=lambda path: path.stem)
def test_the_tables_of_the_checkout_have_names(path):
    named = cost.load(path.stem)
    assert named == cost.load(path) and named.source and named.kv_tokens and named.kv_token_bytes
    assert named.chunk_tokens in {x for x, _ in named.prefill}


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(CostError, match=r"no cost table is called 'teapot'; known: .*v100-opt13b"):
        cost.load("teapot")
    with pytest.raises(CostError, match=r"^teapot.toml: no cost table: No such file"):
        cost.load("teapot.toml")


FINE = "prefill = [[1, 1]]\ndecode = [[1, 1]]\n"


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "prefill is missing: a list of [x, seconds] pairs"),
        ("prefill = [[1, 1]]", "decode is missing"),
        ("prefill = 1\ndecode = [[1, 1]]", "prefill: must be a list of [x, seconds] pairs, got 1"),
        ("prefill = []\ndecode = [[1, 1]]", "prefill: must be a list of [x, seconds] pairs, got ()"),
        ("prefill = [[2, 1], [1, 1]]\ndecode = [[1, 1]]", "prefill: its x must ascend, but 1 comes after 2"),
        ("prefill = [[1, 1], [1, 2]]\ndecode = [[1, 1]]", "prefill: its x must ascend, but 1 comes after 1"),
        ("prefill = [[1, 1]]\ndecode = [[1, 2], [9, 1]]", "decode: its seconds must not fall, but 1 s at 9"),
        ("prefill = [[1]]\ndecode = [[1, 1]]", "prefill: must have two numbers, 0 or more, in each pair, got (1,)"),
        ("prefill = [1, 2]\ndecode = [[1, 1]]", "prefill: must have two numbers"),
        ("prefill = [[1, 'x']]\ndecode = [[1, 1]]", "prefill: must have two numbers"),
        ("prefill = [[1, -1]]\ndecode = [[1, 1]]", "prefill: must have two numbers"),
        ("prefill = [[1, nan]]\ndecode = [[1, 1]]", "prefill: must have two numbers"),
        ("prefill = [[1, inf]]\ndecode = [[1, 1]]", "prefill: must have two numbers"),
        ("prefill = [[true, 1]]\ndecode = [[1, 1]]", "prefill: must have two numbers"),
        (FINE + "tea = 1", "unknown key tea; allowed: prefill, decode, prefill_start_s"),
        (FINE + "decode_context_s = -1e-6", "decode_context_s must be a number, 0 or more, got -1e-06"),
        (FINE + "decode_context_s = nan", "decode_context_s must be a number, 0 or more, got nan"),
        (FINE + "prefill_start_s = '1'", "prefill_start_s must be a number, 0 or more, got '1'"),
        (FINE + "prefill_start_s = true", "prefill_start_s must be a number"),
        (FINE + "kv_tokens = 1.5", "kv_tokens must be a whole number, 0 or more, got 1.5"),
        (FINE + "chunk_tokens = -1", "chunk_tokens must be a whole number"),
        (FINE + "kv_tokens = true", "kv_tokens must be a whole number"),
        (FINE + "predictor_slowdown = 0.5", "predictor_slowdown must be at least 1, got 0.5"),
        (FINE + "source = 1", "source must be a text, got 1"),
        (FINE + f"kv_tokens = {'9' * 5000}", "not a TOML file"),
        ("prefill = " + "[" * 2000, "not a TOML file"),
        ("this is no TOML", "not a TOML file"),
        ("\xff", "not a TOML file"),  # a byte that is no text
    ],
)
def test_what_is_no_table_is_an_error_of_one_line(tmp_path, text, says):
    path = tmp_path / "table.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(CostError) as caught:
        cost.load(path)
    assert str(caught.value).startswith(f"{path}: {says}") and "\n" not in str(caught.value)


def test_a_table_that_is_made_is_checked_as_well():
    with pytest.raises(CostError, match=r"^decode: its seconds must not fall"):
        Cost(decode=((1.0, 2.0), (2.0, 1.0)))
    with pytest.raises(CostError, match=r"^prefill_start_s must be"):
        Cost(prefill_start_s=math.nan)
    with pytest.raises(CostError, match=r"^prefill: must be a list .*\.\.\.$"):
        Cost(prefill=[(float(x), 0.0) for x in range(100)])


def test_a_step_that_does_both_pays_the_fixed_part_once():
    spans = [Span("a", 0, 10)]
    assert MEASURED.step_s(spans, 3, 50) == pytest.approx(1.0 + 0.2 + 0.05 - 0.1)
    assert MEASURED.step_s(spans, 0, 0) == MEASURED.chunk_s(spans)
    assert MEASURED.step_s([], 3, 50) == MEASURED.decode_s(3, 50)
    assert Cost(prefill=((1.0, 0.01),), decode=((1.0, 0.1),)).step_s(spans, 1, 0) == pytest.approx(0.1)


def test_the_predictor_takes_its_time_by_the_prompt():
    assert Cost(predictor_s=0.5, predictor_token_s=0.01).predict_s(100) == pytest.approx(1.5)


def test_the_page_on_cost_tables_names_every_key():
    page = (cost.TABLES.parents[1] / "docs" / "cost.md").read_text(encoding="utf-8")
    assert [field.name for field in fields(Cost) if f"`{field.name}`" not in page] == []


# ---------------------------------------------------------------- corrected

TWO_PHASES = Cost(((1.0, 3.0), (4.0, 6.0)), ((1.0, 2.0), (3.0, 4.0)), prefill_start_s=0.5, decode_context_s=0.25)
CHUNK = [Span("a", 2, 6)]


def corrected(*found):
    cost = CorrectedCost(TWO_PHASES)
    for prefill, decode in found:
        cost.correct(prefill, decode)
    return cost


def predictions(cost):
    prefills = [cost.chunk_s(CHUNK), cost.prompt_s(9, 2, 4), cost.step_s(CHUNK, 0, 0)]
    return prefills, [cost.decode_s(3, 20), cost.decode_run_s(2, 8, 5), cost.step_s([], 3, 20)]


def test_a_factor_corrects_the_predictions_of_its_phase():
    plain = predictions(TWO_PHASES)
    assert predictions(corrected()) == plain
    assert predictions(corrected((3.0, None))) == ([3 * seconds for seconds in plain[0]], plain[1])
    assert predictions(corrected((None, 0.5))) == (plain[0], [0.5 * seconds for seconds in plain[1]])
    assert predictions(corrected((3.0, 0.5), (None, 2.0))) == tuple(
        [factor * seconds for seconds in phase] for factor, phase in zip((3, 2), plain, strict=True)
    )


def test_a_step_of_both_phases_is_a_chunk_and_what_decodes_add():
    added = TWO_PHASES.decode_s(3, 20) - TWO_PHASES.decode_s(1, 0)
    assert corrected((3.0, 0.5)).step_s(CHUNK, 3, 20) == 3 * TWO_PHASES.chunk_s(CHUNK) + 0.5 * added
    same = corrected((4.0, 4.0))
    assert same.step_s(CHUNK, 3, 20) == pytest.approx(4 * TWO_PHASES.step_s(CHUNK, 3, 20))


@pytest.mark.parametrize(
    ("found", "used"),
    [([1.5, 1.51, 1.49], 1.5), ([1.5, 1.54], 1.54), ([2.0, 1.9], 1.9), ([1.01], 1.0), ([1e9], 100.0), ([0.0], 0.01)],
)
def test_a_factor_holds_still_and_within_bounds(found, used):
    cost = corrected(*((each, each) for each in found))
    assert (cost.prefill, cost.decode) == (used, used)
