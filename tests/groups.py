"""Groups of tests, and what is started once for all tests of a group."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import pytest


def group_of(item: pytest.Item) -> str:
    """Tests of a group run one after another in one process: those of a file, or of all files that name one group."""
    mark = item.get_closest_marker("xdist_group")
    assert mark is not None
    return mark.args[0]


class Shared:
    """What was started for the tests of a group, by its settings; it ends with the group's last test."""

    def __init__(self) -> None:
        self.known: dict[object, Any] = {}
        self.leaving = ExitStack()

    def get(self, settings: object, start: Callable[[], AbstractContextManager[Any]]) -> Any:
        if settings not in self.known:
            self.known[settings] = self.leaving.enter_context(start())
        return self.known[settings]

    def close(self) -> None:
        self.known.clear()
        self.leaving.close()
