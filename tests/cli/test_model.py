"""tetri-cli model."""

from tetri import models


def test_model_fetch(run, monkeypatch):
    monkeypatch.setattr(models, "fetch", lambda name: f"/cache/{name}")
    assert run("model", "fetch") == (0, "/cache/smollm2-135m\n", "preparing smollm2-135m\n")
    assert run("model", "fetch", "x")[1] == "/cache/x\n"
