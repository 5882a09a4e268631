"""What a gateway counts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

MOST_NAMES = 64  # of ignored fields, which clients may invent
OTHERS = "(others)"
_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)  # what status can show on a terminal


class Counts:
    """Answers by status, ignored fields by name, and how many answers are being given."""

    def __init__(self) -> None:
        self.open = 0
        self._answered: Counter[int] = Counter()
        self._ignored: Counter[str] = Counter()

    def answered(self, status: int) -> None:
        """An answer has begun."""
        self._answered[status] += 1

    def ignored(self, names: Iterable[str]) -> None:
        """A request had these fields, which have no effect."""
        for name in names:
            known = name in self._ignored or (len(self._ignored) < MOST_NAMES and _NAME.fullmatch(name))
            self._ignored[name if known else OTHERS] += 1

    @contextmanager
    def opened(self) -> Iterator[None]:
        """An answer is being given while the `with` lasts."""
        self.open += 1
        try:
            yield
        finally:
            self.open -= 1

    def plain(self) -> dict[str, Any]:
        """As values for JSON."""
        answered = {str(status): count for status, count in sorted(self._answered.items())}
        return {"open": self.open, "answered": answered, "ignored": dict(self._ignored)}
