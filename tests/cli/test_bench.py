"""tetri-cli bench: its options, and what it refuses."""

import importlib.util

import pytest

from tetri.cli.bench import REGIMES, Rate
from tetri.sim.sweep import cases


def test_both_commands_are_listed(run):
    status, out, _ = run("bench", "--help")
    assert status == 0 and "run" in out and "compare" in out


def test_the_regimes_are_those_of_the_sweep():
    assert {*REGIMES} == {*cases.REGIMES}


@pytest.mark.parametrize("text", ["1", "0.25", "70%", "120.5%"])
def test_a_rate_is_a_number_or_a_share(text):
    assert Rate().convert(text, None, None) == text


@pytest.mark.parametrize("command", ["run", "compare"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--rate", "fast"), "'fast' is neither requests per second nor a share such as 70%"),
        (("--rate", "0%"), "'0%' is neither"),
        (("--rate", "nan"), "'nan' is neither"),
        (
            ("--workload", "LP"),
            "no workload 'LP': choose from LPLD, LPHD, HPLD, HPHD, Mixed, session, or give a --trace",
        ),
        (("--trace", "/nowhere.csv"), "/nowhere.csv: cannot be read: No such file"),
        (("--ttft", "1"), "give --ttft and --tpot together, or neither"),
        (("--requests", "1"), "--requests"),
        (("--set", "engine.kinds=1"), "engine.kinds"),
        (("--arrangement", "sglang"), "--arrangement must"),
        (("--plot", "runs.jpg"), "--plot draws a PNG"),
        (("--out", "/nowhere/runs.jsonl"), "--out: there is no folder /nowhere"),
    ],
)
def test_what_cannot_be_measured_is_one_line(run, place, command, options, said):
    status, out, err = run("bench", command, "--conf", "conf/emulated.toml", *options)
    assert (status, out, len(err.splitlines())) == (2, "", 1) and said in err


def test_without_the_client_s_library_it_says_what_to_install(run, place, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status, _, err = run("bench", "run", "--conf", "conf/emulated.toml")
    assert status == 2 and "the client needs aiohttp: pip install 'tetri[bench]'" in err
