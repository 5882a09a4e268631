"""The screen of `top`: the instances in two banks, requests by stage, latencies, and what has happened."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tetri.cli import columns as shown
from tetri.cli.columns import Column, cells
from tetri.cli.status import monitor
from tetri.cli.units import NOTHING, ago, bar, count, limits, number, seconds
from tetri.metrics import Bucketed, attainment
from tetri.rates import Span, Window
from tetri.request import DECODE_ROLES, PREFILL_ROLES, Stage
from tetri.terminal import harmless
from tetri.wire.clients import InstanceStatus, Observation
from tetri.wire.observation import ClusterEvent

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table
    from rich.text import Text

WINDOW_S = 10.0  # of the latencies and rates
EVENTS = 6  # the last ones that are shown
WIDE = 160  # columns from which the banks stand side by side
_HEADINGS = 11  # lines besides rows of instances, events and notes
_ROLE = Column("role", lambda i, a: shown.ROLE.text(i, a) if i.state == "ready" else i.state, False)
PREFILL = (
    *(shown.INSTANCE, _ROLE, shown.QUEUED, shown.QUEUE_TIME, shown.FILL, shown.KV_USED, shown.BUSY),
    shown.PREFILL_RATIO,
)
DECODE = (
    *(shown.INSTANCE, _ROLE, shown.WAITING, shown.RUNNING, shown.HEAVY, shown.BATCH, shown.KV_USED, shown.BUSY),
    shown.DECODE_RATIO,
)
_BAD = {"lost", "failing", "killed"}


class Screen:
    """What the Observations so far come to. `whole`: show all instances, on however many lines."""

    def __init__(self, whole: bool = False) -> None:
        self.away = ""  # why the last Observation is old
        self._whole, self._window = whole, Window(WINDOW_S)
        self._last: tuple[float, Observation, Span] | None = None
        self._events: deque[tuple[float, ClusterEvent]] = deque(maxlen=EVENTS)

    @property
    def seen(self) -> tuple[int, int]:
        """Epoch and serial of the last Observation, for the next Observe."""
        return (self._last[1].epoch, self._last[1].serial) if self._last else (0, 0)

    def observed(self, now: float, observation: Observation) -> None:
        """Take the newest Observation. `now`: a clock that never goes back."""
        if self._last and self._last[1].epoch != observation.epoch:
            self._events.clear()
        self._last = now, observation, self._window.add(now, observation)
        self._events.extend((now - event.age_s, event) for event in observation.events)
        self.away = ""

    def render(self, now: float, width: int, height: int, plain: bool) -> Group:
        """The screen as it is to be at this moment; `plain`: in ASCII."""
        from rich.console import Group
        from rich.text import Text

        lines = [Text(f"the broker does not answer: {harmless(self.away)}", "bold red")] if self.away else []
        if self._last is None:
            return Group(*lines)
        at, observation, span = self._last
        if self.away:
            lines.append(Text(f"below: as of {ago(now - at)} ago", "red"))
        notes = [Text(f"degraded  {harmless(note)}", "yellow") for note in observation.status.notes]
        events = [_event(now - when, event) for when, event in self._events]
        wrapped = sum(-(-len(text) // max(width - 10, 10)) for text in (*lines, *notes, *events))  # a little too many
        space = None if self._whole else height - _HEADINGS - wrapped
        banks = _banks(observation.status.instances, span, width, space, plain)
        return Group(
            *lines, *_summary(observation, span), Text(), banks, *([Text(), *events] if events else ()), *notes
        )


def _summary(observation: Observation, span: Span) -> list[Text]:
    """The lines above the banks."""
    from rich.text import Text

    status, age = observation.status, span.seconds
    stages = [stage for stage in Stage if not stage.ended]
    requests = "   ".join(f"{stage} {status.requests.get(stage, 0)}" for stage in stages)
    rates = f"   {number(span.tokens / age)} tokens/s   {number(span.ended / age)} requests/s" if age else ""
    predicted, real = span.queue
    lasting = "so far" if age is None else f"last {age:.0f} s"
    lines = [
        f"model     {harmless(status.model)}",
        f"monitor   {monitor(status.monitor)}",
        f"requests  {requests}",
        f"{lasting:<10}{_latency('TTFT', span.ttft)}   {_latency('TPOT', span.tpot)}",
        f"limits    {limits(status.slo)}   {_kept(span)}",
        f"queue     predicted {seconds(predicted)}   real {seconds(real)}{rates}",
    ]
    return [Text(line, no_wrap=True, overflow="crop") for line in lines]


def _kept(span: Span) -> str:
    kept = attainment(span.slo_requests)
    goodput = "" if span.goodput is None else f"   goodput {number(span.goodput)} requests/s"
    return f"kept {NOTHING if kept is None else f'{kept:.0%}'}{goodput}"


def _latency(name: str, found: Bucketed | None) -> str:
    if found is None:
        return f"{name} {NOTHING}"
    half, most = found.percentiles()
    return f"{name} p50 {seconds(half)} p99 {seconds(most)}"


def _event(age_s: float, event: ClusterEvent) -> Text:
    from rich.text import Text

    text = harmless(f"{event.kind:<9} {event.iid}  {event.note}".rstrip())
    return Text(f"{ago(age_s):>10} ago  {text}", "bold red" if event.kind in _BAD else "")


def _banks(
    instances: Sequence[InstanceStatus], span: Span, width: int, space: int | None, plain: bool
) -> RenderableType:
    """The two banks: an instance is in each whose work it takes, or still has. `space`: lines for rows; None: any."""
    from rich.table import Table

    prefill = [each for each in instances if each.role in PREFILL_ROLES or each.load.queued]
    decode = [each for each in instances if each.role in DECODE_ROLES or each.load.waiting or each.load.running]
    side_by_side = width >= WIDE
    total, own = len(prefill) + len(decode), width // 2 if side_by_side else width
    meter = _meter(max(min(own - 72, 24), 4), plain)
    grid = Table.grid(padding=(0, 2, 0, 0))
    tables = []
    for title, some, columns in (("prefill", prefill, PREFILL), ("decode", decode, DECODE)):
        most = space if side_by_side or space is None else space * len(some) // max(total, 1)
        tables.append(_bank(title, some, columns, span, most, meter))
    if side_by_side:
        grid.add_row(*tables)
    else:
        for table in tables:
            grid.add_row(table)
    return grid


def _meter(width: int, plain: bool) -> Callable[[InstanceStatus], str]:
    """A bar of the KV blocks that are used."""

    def drawn(instance: InstanceStatus) -> str:
        used = instance.blocks - max(instance.load.free_blocks, 0)
        return bar(used / instance.blocks, width, plain=plain) if used > 0 else " " * width

    return drawn


def _bank(
    title: str,
    instances: Sequence[InstanceStatus],
    columns: Sequence[Column],
    span: Span,
    most: int | None,
    meter: Callable[[InstanceStatus], str],
) -> Table:
    """One bank; of more instances than fit the lost ones first, then those with the most work."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0), title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column.title, justify="right" if column.right else "left", no_wrap=True, header_style="dim")
    shown_now = [*instances]
    if most is not None and len(instances) > max(most, 1):
        kept = {each.iid for each in sorted(instances, key=_importance, reverse=True)[: max(most - 1, 1)]}
        shown_now = [each for each in instances if each.iid in kept]
    for each in shown_now:
        texts = [harmless(text) for text in cells(columns, each, span.activities.get(each.iid))]
        at = columns.index(shown.KV_USED)
        texts[at] = f"{meter(each)} {texts[at]:>4}"
        table.add_row(*map(_plain, texts), style="" if each.state == "ready" else "red")
    if hidden := len(instances) - len(shown_now):
        table.caption, table.caption_justify = f"{count(hidden, 'more instance')}: they have less work", "left"
    if not instances:
        table.add_row("none")
    return table


def _importance(instance: InstanceStatus) -> tuple[bool, float]:
    load = instance.load
    return instance.state != "ready", load.queued_s + load.decode_s


def _plain(text: str) -> RenderableType:
    from rich.text import Text

    return Text(text)
