"""Run one vLLM engine and one length predictor in the benchmark's own process on one core."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from tetri.bench.report import one_line, own_stdout
from tetri.engine.base import EngineError
from tetri.models import ModelError, find, weights_hash
from tetri.predict.lengths import PredictError
from tetri.predict.model import shipped_for
from tetri.proc.cpus import pin
from tetri.strict import ConfigError


@contextmanager
def on_one_core(program: str, cpu: int | None) -> Iterator[TextIO]:
    """Pin this process to `cpu`, by default the last one that it may use, and yield the stream for results. Errors of
    the engine and the predictor end the program with one line and exit status 2."""
    out = own_stdout()
    with one_line(program, ConfigError, EngineError, ModelError, PredictError, OSError, status=2):
        pin(str(max(os.sched_getaffinity(0)) if cpu is None else cpu))
        yield out


def model_and_predictor(model: str, folder: Path | None) -> tuple[Path, str, Path]:
    """Return the model's folder, the hash of its weights and the predictor's folder, by default the shipped one. Raises
    ModelError and PredictError."""
    place = find(model)
    weights = weights_hash(place)
    folder = folder or shipped_for(weights)
    if folder is None:
        raise PredictError(f"tetri has no predictor for {model}: pass one with --predictor")
    return place, weights, folder
