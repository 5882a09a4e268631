import struct

import pytest

from tetri.bench.compare.plot import COLOURS, colour, draw

NAMES = ("tetri-auto", "vllm")


def size(path):
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    return struct.unpack(">II", data[16:24])


def cell(title="Mixed at 70%"):
    return title, {metric: {name: [0.1, 0.2, 0.4] for name in NAMES} for metric in ("TTFT", "TPOT", "JCT")}


def found(goodput=()):
    cells = []
    for rate in (1.0, 2.0):
        measured = {"attained": 1 / rate, "TTFT mean": rate, "JCT mean": 9.0}
        rows = {"tetri-auto": {"measured": measured}, "vllm": {"error": "it ended"}}
        cells.append({"workload": "Mixed", "regime": "balanced", "rate_s": rate, "arrangements": rows})
    return {"cells": cells, "goodput": list(goodput)}


def test_a_row_for_each_cell_and_one_for_the_rates_of_each_regime(tmp_path):
    heights = []
    for number, (cells, made) in enumerate([([cell()], found()), ([cell()] * 2, found()), ([cell()], found([1]))]):
        draw(path := tmp_path / f"{number}.png", cells, made)
        heights.append(size(path)[1])
    assert heights[1] == pytest.approx(2 * heights[0], abs=2) and heights[2] == heights[1]


def test_each_arrangement_has_a_colour():
    assert [colour(NAMES, name) for name in NAMES] == [*COLOURS[:2]]
