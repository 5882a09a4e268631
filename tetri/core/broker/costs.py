"""What the broker knows of the time of steps: one cost table, and how much slower or faster each instance is."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median_high

from tetri.core.broker.membership import Member
from tetri.cost import CorrectedCost, Cost, CostError
from tetri.wire.messages import CostTable

TOKEN_S = 1e-6  # seconds per prompt token while there is no table: queues are then compared by their tokens
EMPTY = Cost()


class Costs:
    """The broker's cost table: that of the configuration, else the first one that a worker announces.

    The times of an instance are those of the table times its `slowness`: how much longer its own table says, times how
    much longer its steps take than that. The times of none in particular, such as limits of latency, are by `cost`,
    which the instance in the middle corrects."""

    def __init__(self, table: Cost, chunk_tokens: int) -> None:
        self.cost, self.chunk_tokens = CorrectedCost(table), chunk_tokens
        self._scales: dict[str, tuple[float, float]] = {}  # iid -> its own table over this one: prefill, decode

    @property
    def known(self) -> bool:
        """Whether there is a table."""
        return self.cost.table != EMPTY

    def work_s(self, tokens: int) -> float:
        """Seconds of a prompt of so many tokens by the table, not corrected."""
        return self.cost.table.prompt_s(tokens, 0, self.chunk_tokens) or tokens * TOKEN_S

    def announced(self, member: Member, announced: CostTable | None) -> None:
        """A worker has registered, with this table; one that is no valid table does not count."""
        self._scales.pop(member.iid, None)
        table = None if announced is None else _valid(announced)
        if table is not None:
            if not self.known:
                self.cost.table = table
            self._scales[member.iid] = self._scale(table)
        self.compare(member)

    def compare(self, member: Member) -> None:
        """A worker has reported how long its steps take: set its slowness."""
        member.slowness = (member.step_ratio.prefill or 1.0) * self._scales.get(member.iid, (1.0, 1.0))[0]

    def correct(self, members: Iterable[Member]) -> None:
        """Correct `cost` by the instance in the middle of those that have compared steps."""
        prefills, decodes = list[float](), list[float]()
        for member in members:
            ratio, scale = member.step_ratio, self._scales.get(member.iid, (1.0, 1.0))
            prefills += [] if ratio.prefill is None else [ratio.prefill * scale[0]]
            decodes += [] if ratio.decode is None else [ratio.decode * scale[1]]
        self.cost.correct(*(median_high(ratios) if ratios else None for ratios in (prefills, decodes)))

    def _scale(self, table: Cost) -> tuple[float, float]:
        """How much longer a whole chunk, and a decode step of one request, take by this table."""
        own, chunk = self.cost.table, self.chunk_tokens
        prefills = table.prompt_s(chunk, 0, chunk), own.prompt_s(chunk, 0, chunk)
        decodes = table.decode_s(1, 0), own.decode_s(1, 0)
        prefill, decode = (found / known if found and known else 1.0 for found, known in (prefills, decodes))
        return prefill, decode


def _valid(announced: CostTable) -> Cost | None:
    prefill, decode = (tuple(map(tuple, curve)) for curve in (announced.prefill, announced.decode))
    try:
        return Cost(prefill, decode, announced.prefill_start_s, announced.decode_context_s)  # type: ignore[arg-type]
    except CostError:
        return None
