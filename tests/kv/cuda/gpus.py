"""The GPUs of this machine for the tests marked `gpu`, and what they report. With $TETRI_CUDA_STAND_IN, a folder, they
run on the stand-in: so those tests can themselves be tried where there is no GPU."""

import json
import os
from typing import Any

import pytest

from tests.kv.cuda.process import Cuda
from tetri.kv.base import KVError
from tetri.kv.cuda.runtime import load

STAND_IN, ROWS = "TETRI_CUDA_STAND_IN", "TETRI_GPU_ROWS"
PLAYED = 2  # GPUs, when it is a stand-in


def machine() -> Cuda:
    """Skips the test, with the reason, where there is no GPU."""
    if os.environ.get(STAND_IN):
        return Cuda(os.environ[STAND_IN], {"devices": PLAYED, "peers": [(0, 1)]})
    try:
        load()
    except KVError as error:
        pytest.skip(str(error))
    return Cuda()


def count() -> int:
    return PLAYED if machine().stand_in else load().cuda.runtime.getDeviceCount()


def report(check: str, **values: Any) -> None:
    """A row for tools/gpu_check, which says where by $TETRI_GPU_ROWS."""
    if os.environ.get(ROWS):
        with open(os.environ[ROWS], "a", encoding="utf-8") as rows:
            rows.write(json.dumps({"check": check, **values}) + "\n")
