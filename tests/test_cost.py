"""What chunks and steps cost."""

import pytest

from tetri import cost
from tetri.cost import Cost, CostError
from tetri.leg import Span

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
    assert MEASURED.chunk_s([]) == 0.0


@pytest.mark.parametrize("batch, seconds", [(1, 0.1), (2, 0.15), (3, 0.2), (5, 0.3)])
def test_a_decode_step_costs_by_batch_and_context(batch, seconds):
    assert MEASURED.decode_s(batch, 50) == pytest.approx(seconds + 0.05)
    assert MEASURED.decode_s(0, 50) == 0.0


def test_nothing_costs_nothing_by_default():
    assert Cost().chunk_s([Span("a", 0, 900)]) == Cost().decode_s(9, 900) == 0.0


def test_a_table_is_read(tmp_path):
    path = tmp_path / "table.toml"
    path.write_text("prefill = [[1, 0.5]]\ndecode = [[1, 0.1], [2, 0.2]]\ndecode_context_s = 1\n")
    assert cost.load(path) == Cost(((1.0, 0.5),), ((1.0, 0.1), (2.0, 0.2)), 0.0, 1.0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "prefill = 1\ndecode = [[1, 1]]",
        "prefill = []\ndecode = [[1, 1]]",
        "prefill = [[2, 1], [1, 1]]\ndecode = [[1, 1]]",
        "prefill = [[1, 1], [1, 2]]\ndecode = [[1, 1]]",
        "prefill = [[1]]\ndecode = [[1, 1]]",
        "prefill = [[1, 'x']]\ndecode = [[1, 1]]",
        "prefill = [[1, 1]]\ndecode = [[1, 1]]\ntea = 1",
        "this is no TOML",
    ],
)
def test_what_is_no_table_is_an_error_of_one_line(tmp_path, text):
    path = tmp_path / "table.toml"
    path.write_text(text)
    with pytest.raises(CostError) as caught:
        cost.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_table_that_is_not_there(tmp_path):
    with pytest.raises(CostError, match="no cost table"):
        cost.load(tmp_path / "none.toml")
