"""tetri-cli bench compare with the real model, and with vLLM's own server as the rival."""

import json
import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]

REPOSITORY = Path(__file__).parents[3]
OPTIONS = ("--workload", "session", "--requests", "6", "--rate", "2", "--repeats", "1", "--eager", "--json")


def test_a_server_of_vllm_and_one_of_tetri_serve_the_same(tmp_path):
    command = [REPOSITORY / "bin" / "tetri-cli", "bench", "compare", "--set", "engine.cost=cpu-smollm2.toml", *OPTIONS]
    command += ["--arrangement", "vllm", "--arrangement", "tetri-auto", "--out", tmp_path / "runs.jsonl"]
    done = subprocess.run(command, check=True, timeout=500, capture_output=True, text=True)
    (cell,) = json.loads(done.stdout)["cells"]
    rows = cell["arrangements"]
    assert {*rows} == {"vllm", "tetri-auto"} == {*cell["against"]}
    for row in rows.values():
        assert (row["failed"], row["error"]) == (0, "")
        assert 0 < row["measured"]["TTFT mean"] < row["measured"]["JCT mean"] and row["measured"]["TPOT mean"] > 0.001
    answers = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    shapes = [[each[3:5] for each in line["answers"]] for line in answers if line["type"] == "run"]
    assert len(shapes) == 2 and shapes[0] == shapes[1]  # prompt and output tokens
