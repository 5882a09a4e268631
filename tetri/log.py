"""Logging for every process: one line on stderr per record, `time level process message`."""

from __future__ import annotations

import logging
import os
import sys
from datetime import datetime

LEVELS = ("debug", "info", "warning", "error")


class LogError(ValueError):
    """$TETRI_LOG is not a log level; one line."""


class _OneLine(logging.Formatter):
    """Local time with milliseconds. The lines of a message or traceback are joined with " | "."""

    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {process} %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return datetime.fromtimestamp(record.created).isoformat(timespec="milliseconds")

    def format(self, record: logging.LogRecord) -> str:
        return " | ".join(super().format(record).splitlines())


def start(process: str, default: str = "info") -> logging.Logger:
    """Send this process's log records to stderr, from the level in $TETRI_LOG or `default` on. Raises LogError."""
    level = os.environ.get("TETRI_LOG") or default
    if level.lower() not in LEVELS:
        raise LogError(f"TETRI_LOG must be one of: {', '.join(LEVELS)}, got {level!r}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine(process))
    logger = logging.getLogger("tetri")
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False
    return logger


def fields(**values: object) -> str:
    """`rid=r1 iid=p0`, for the end of a message; values that are None are left out."""
    return " ".join(f"{name}={value}" for name, value in values.items() if value is not None)
