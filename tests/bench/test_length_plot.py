"""A picture of predicted against real lengths."""

from tetri.bench.length_plot import draw

SAID = {
    "hidden": [(10.0, 50.0, 200.0), (300.0, 500.0, 1024.0)],
    "classifier": [(0.0, 90.0, 400.0), (20.0, 90.0, 900.0)],
}


def test_it_draws_a_png_the_same_each_time(tmp_path):
    for name in ("a.png", "b.png"):
        draw(tmp_path / name, SAID, [40, 700])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]
