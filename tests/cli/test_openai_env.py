"""tetri-cli openai-env: what OpenAI's clients read from the environment."""

import json

from tetri.proc.gateway.keys import VARIABLE


def test_the_variables_of_the_first_gateway(run, place, monkeypatch):
    for name, port in (("gateway", 8000), ("gateway1", 8001)):
        (place / f"{name}.json").write_text(json.dumps({"url": f"http://127.0.0.1:{port}"}))
    monkeypatch.delenv(VARIABLE, raising=False)
    assert run("openai-env") == (
        0,
        "export OPENAI_BASE_URL=http://127.0.0.1:8000/v1\nexport OPENAI_API_KEY=none\n",
        "",
    )
    monkeypatch.setenv(VARIABLE, "a b")
    assert "export OPENAI_API_KEY='a b'\n" in run("openai-env")[1]


def test_without_a_gateway_there_is_nothing_to_print(run, place):
    status, out, err = run("openai-env")
    assert status == 3 and out == "" and err.startswith("tetri-cli: no HTTP gateway is up in ")
