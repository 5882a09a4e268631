"""The HTTP gateway in front of the real model: the same answers as vLLM's own server gives, and vLLM's benchmark."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import openai
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


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def chat(client, **options):
    asked = {"model": "smollm2-135m", "messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 12}
    return client.chat.completions.create(**{**asked, "seed": 7, **options})


def test_each_of_four_choices_is_a_request_with_its_seed(client):
    made = chat(client, n=4, logprobs=True).choices
    texts = {choice.index: choice.message.content for choice in made}
    assert texts == {index: chat(client, seed=7 + index).choices[0].message.content for index in range(4)}
    assert len(set(texts.values())) == 4 and all(len(choice.logprobs.content) == 12 for choice in made)
    streamed = dict.fromkeys(range(4), "")
    for piece in chat(client, n=4, stream=True):
        for choice in piece.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def test_a_stream_that_is_closed_is_cancelled(client, cluster):
    with chat(client, max_tokens=1000, stream=True, extra_body={"ignore_eos": True}) as stream:
        assert next(iter(stream)).choices[0].delta.role == "assistant"
    cluster.wait_idle()
