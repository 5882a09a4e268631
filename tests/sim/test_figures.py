"""The numbers that the paper plots."""

import tomllib

from tetri.sim.figures import FILE, plotted


def test_the_papers_numbers_are_read_once_and_whole():
    assert plotted() is plotted()
    table = tomllib.loads(FILE.read_text(encoding="utf-8"))
    assert list(table["end_to_end"]) == ["LPLD", "LPHD", "HPLD", "HPHD", "Mixed"]
    for shown in table["end_to_end"].values():
        assert {system for metric in shown.values() for system in metric} == {"vllm16", "tetri-roce", "tetri-nvlink"}
