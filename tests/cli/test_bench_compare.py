"""tetri-cli bench compare, on emulated engines."""

import json

import pytest

FAST = ("bench", "compare", "--conf", "conf/emulated.toml", "--set", "engine.cost=cpu-smollm2.toml", "--set",
        "emulated.time_scale=0.2", "--workload", "LPLD", "--requests", "6", "--repeats", "1")  # fmt: skip


def test_a_comparison_goes_on_where_it_was(run, place, tmp_path):
    out, plot = tmp_path / "runs.jsonl", tmp_path / "runs.png"
    status, text, err = run(*FAST, "--arrangement", "tetri-auto", "--rate", "10", "--out", out)
    assert status == 0, err
    assert text.startswith("LPLD at 10 requests/s (10), balanced: TTFT <= ") and "start 1 of 1" in err
    once = out.read_bytes()
    status, text, err = run(
        *FAST, "--arrangement", "tetri-auto", "--arrangement", "tetri-2+2", "--rate", "10", "--out", out, "--json",
        "--plot", plot,
    )  # fmt: skip
    assert status == 0, err
    assert "start 1 of 1" in err and "tetri-auto, LPLD" not in err  # of the two, one is known
    assert out.read_bytes().startswith(once) and plot.read_bytes().startswith(b"\x89PNG")
    (cell,) = json.loads(text)["cells"]
    assert {*cell["arrangements"]} == {"tetri-2+2", "tetri-auto"} == {*cell["against"]}
    for row in cell["arrangements"].values():
        assert row["failed"] == 0 and row["measured"]["JCT mean"] > 0 and row["predicted"]["JCT mean"] > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--capacity-of", "vllm"), "--capacity-of must be one of tetri-1+3, tetri-2+2,"),
        (("--arrangement", "vllm*"), "--arrangement must match one of tetri-1+3,"),
        (("--regime", "tight"), "--regime"),
    ],
)
def test_what_cannot_be_compared_is_one_line(run, place, options, said):
    status, out, err = run(*FAST, *options)
    assert (status, out, len(err.splitlines())) == (2, "", 1) and said in err


def test_runs_of_another_comparison_are_refused(run, place, tmp_path):
    out = tmp_path / "runs.jsonl"
    out.write_text('{"type": "settings", "values": {"requests": 7}}\n')
    status, _, err = run(*FAST, "--out", out)
    assert status == 1 and f"{out} was made with model None, not emulated: choose another file (--out)" in err
