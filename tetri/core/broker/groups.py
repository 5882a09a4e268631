"""Which choices of a request go together: through a prefill, and into another attempt."""

from __future__ import annotations

from collections.abc import Iterable

from tetri.core.broker.requests import Choice


def sharing_a_prefill(choices: Iterable[Choice]) -> list[list[Choice]]:
    """The choices by the prefill that they can share: those of one request without output, each other one alone."""
    groups: dict[tuple[str, int], list[Choice]] = {}
    for choice in choices:
        groups.setdefault((choice.request.rid, choice.index + 1 if choice.output else 0), []).append(choice)
    return [*groups.values()]


def given_up_together(choice: Choice) -> list[Choice]:
    """The choices that are given up with this one: without output, those of the request that wait for the prefill of
    the same instance. Its worker reports each of them."""
    if choice.output or choice.holder != choice.prefill:
        return [choice]
    return [each for each in choice.request.choices if each.holder == choice.prefill and not each.output]
