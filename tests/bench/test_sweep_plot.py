from tetri.bench.sweep_plot import draw


def case(name, **goodputs):
    arrangements = [{"arrangement": kind, "goodput": goodput} for kind, goodput in goodputs.items()]
    return {"case": name, "bound": 2.0, "arrangements": arrangements}


def test_a_sweep_is_a_png_with_a_panel_for_each_regime(tmp_path):
    cases = [
        case("LPLD/v100/2/balanced", coupled=1.0, split=None, auto=1.1),
        case("LPLD/v100/2/tight-ttft", coupled=1.0),
    ]
    draw(tmp_path / "sweep.png", cases)
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG\r\n")
