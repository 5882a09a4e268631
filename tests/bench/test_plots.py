"""Pictures of a run."""

from tetri.bench.plots import draw, joined

TIMES = {"TTFT": [0.1, 0.3, 0.2], "JCT": [1.0, 2.0, 3.0]}
SPANS = {
    "p0": [(0.0, 1.0, "prefill"), (1.5, 2.0, "prefill")],
    "d0": [(0.5, 3.0, "decode")],
    "m0": [(0.0, 0.5, "mixed"), (0.5, 2.5, "decode")],
}


def test_it_draws_a_png(tmp_path):
    draw(tmp_path / "run.png", TIMES, SPANS)
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_the_same_values_draw_the_same_picture(tmp_path):
    for name in ("a.png", "b.png"):
        draw(tmp_path / name, TIMES, SPANS)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_nothing_done_can_be_drawn_too(tmp_path):
    draw(tmp_path / "run.png", {"TTFT": [], "JCT": []}, {"p0": []})
    assert (tmp_path / "run.png").exists()


def test_bars_with_little_between_them_are_joined():
    assert joined([(0.0, 1.0), (1.1, 2.0), (3.0, 4.0)], 0.2) == [(0.0, 2.0), (3.0, 4.0)]
    assert joined([(0.0, 1.0), (1.0, 2.0)], 0.0) == [(0.0, 2.0)]
