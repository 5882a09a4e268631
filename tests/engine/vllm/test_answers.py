"""The HTTP gateway in front of the real model: the same answers as vLLM's own server gives, and vLLM's benchmark."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from live import LiveCluster

from tetri.bench.compare_api import asked, cases, compared, model_of
from tetri.proc import gateways

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]

REPOSITORY = Path(__file__).parents[3]
ANSWERS = REPOSITORY / "tests" / "openai" / "vllm.json"  # made by tools/compare_api --record


@pytest.fixture
def url(cluster: LiveCluster) -> str:
    return gateways.urls(cluster.folder).get("gateway") or cluster.start_gateway()


def test_vllms_own_server_gives_the_same_answers(url):
    made = cases(model_of(url))
    found = compared(asked(url, made), json.loads(ANSWERS.read_text()))
    print("\n".join(found.ties))
    assert found.differences == [] and len(found.ties) < 5
    assert sum(case.name.startswith(("completion ", "chat ")) for case in made) >= 100


@pytest.mark.parametrize(
    "kind", [["openai"], ["openai-chat", "--endpoint", "/v1/chat/completions"]], ids=["completions", "chat"]
)
def test_vllms_benchmark_knows_model_and_tokenizer_from_the_gateway(url, kind, tmp_path):
    command = [REPOSITORY / "tools" / "vllm", "bench", "serve", "--base-url", url, "--backend", *kind]
    command += ["--dataset-name", "random", "--random-input-len", "32", "--random-output-len", "4"]
    command += ["--num-prompts", "8", "--save-result", "--result-dir", tmp_path, "--result-filename", "found.json"]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["completed"], found["failed"], found["total_output_tokens"]) == (8, 0, 32)
