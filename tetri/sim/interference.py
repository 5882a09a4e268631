"""Figures 3 to 5 of the paper: how much prefills and decodes of one iteration slow each other down, computed from the
cost table and compared with the paper's measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tetri.cost import Cost
from tetri.engine_request import Span
from tetri.sim.figures import Point, plotted

LIGHT, HEAVY = 18, 512  # prompt tokens (paper, section 2)
LIGHT_CONTEXT, HEAVY_CONTEXT = 48, 290  # mean tokens of a decode's context while it runs: see the cost table


def prompts(*tokens: int) -> list[Span]:
    """Return the spans of whole prompts with these token counts."""
    return [Span(str(i), 0, count) for i, count in enumerate(tokens)]


def _step(cost: Cost, tokens: list[int], light_decodes: int) -> float:
    return cost.step_s(prompts(*tokens), light_decodes, light_decodes * LIGHT_CONTEXT)


#: curve -> function that gives the seconds of an iteration with N other requests
FIGURE_3: dict[str, Callable[[Cost, int], float]] = {
    "light_and_light": lambda cost, others: _step(cost, [LIGHT] * (1 + others), 0),
    "light_and_heavy": lambda cost, others: _step(cost, [LIGHT] + [HEAVY] * others, 0),
    "heavy_and_light": lambda cost, others: _step(cost, [HEAVY] + [LIGHT] * others, 0),
}
FIGURE_4: dict[str, Callable[[Cost, int], float]] = {
    "light_decode_and_light_prefills": lambda cost, others: _step(cost, [LIGHT] * others, 1),
    "light_decode_and_heavy_prefills": lambda cost, others: _step(cost, [HEAVY] * others, 1),
    "light_prefill_and_light_decodes": lambda cost, others: _step(cost, [LIGHT], others),
    "heavy_prefill_and_light_decodes": lambda cost, others: _step(cost, [HEAVY], others),
}


def decode_rate(cost: Cost, batch: int, heavy_share: float) -> float:
    """Return the tokens/s of a decode batch in which this share of the requests is heavy."""
    context = batch * (LIGHT_CONTEXT + heavy_share * (HEAVY_CONTEXT - LIGHT_CONTEXT))
    return batch / cost.decode_s(batch, round(context))


def points(cost: Cost) -> Iterator[Point]:
    """Yield every point that the paper plots: seconds in Figures 3 and 4, tokens/s in Figure 5."""
    paper = plotted()
    for figure, curves in (("figure3", FIGURE_3), ("figure4", FIGURE_4)):
        for name, seconds in curves.items():
            for others, value in paper[figure][name]:
                yield Point(figure, f"{name}+{others}", seconds(cost, others), value)
    for share, curve in paper["figure5"].items():
        for batch, value in curve:
            yield Point("figure5", f"batch {batch}, heavy {share}", decode_rate(cost, batch, float(share)), value)
