"""A Timeline as lines of text: what happened, where, when, and for how long."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from tetri.cli.units import NOTHING, ago, amount, bar, count, limits, number, seconds, sparkline
from tetri.request import Receipt, choice_id
from tetri.terminal import harmless
from tetri.wire.observation import StageSpan, StepSpan, Timeline, TraceEvent

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

MISHAPS = ("retry", "migrated", "preempted", "refused")  # what makes a request late
SLOWEST = 5  # decode steps that are shown one by one
_RESULTS = {"met": "kept", "ttft": "missed TTFT", "tpot": "missed TPOT", "both": "missed both"}
_TITLE, _BAR = 9, (12, 60)  # characters: of a title, and the least and most of a bar


def _tokens(event: TraceEvent) -> str:
    beside = event.size - (event.last - event.first)
    return f"tokens {event.first} to {event.last}" + (f", beside {count(beside, 'other')}" if beside > 0 else "")


def _fetch(event: TraceEvent) -> str:
    speed = f", {amount(event.size / event.seconds)}/s" if event.size and event.seconds > 0 else ""
    return f"blocks {event.first} to {event.last}, {amount(event.size)}{speed}, {event.note}"


_DETAIL: dict[str, Callable[[TraceEvent], str]] = {
    "chunk": _tokens,
    "recompute": _tokens,
    "offered": lambda e: f"KV to {e.peer}",
    "granted": lambda e: e.note or f"{e.peer} has reserved memory",
    "deferred": lambda e: f"{e.peer} has no memory now",
    "refused": lambda e: f"{e.peer} refused: {e.note}",
    "export": lambda e: f"KV chunk {e.size}, blocks {e.first} to {e.last}",
    "fetch": _fetch,
    "preempted": lambda e: "lost its memory to others",
    "retry": lambda e: f"attempt {e.attempt}: {e.note}",
    "migrated": lambda e: f"from {e.peer} to {e.iid}",
}


class Row(NamedTuple):
    """A line of the waterfall: a stage, or below it something that happened in it."""

    name: str
    iid: str
    start_s: float
    seconds: float
    detail: str
    stage: bool = False


def detail(event: TraceEvent) -> str:
    """What there is to say of an event besides where and when it was."""
    describe = _DETAIL.get(event.kind)
    return harmless(event.note if describe is None else describe(event))


def rows(timeline: Timeline) -> list[Row]:
    """Stages and events in the order of time; an event stands below the last stage that began before it."""
    stages = [(span.start_s, 0, _stage(span, timeline.attempts)) for span in timeline.stages]
    first = timeline.stages[0].start_s if timeline.stages else 0.0
    events = [(max(event.at, first), 1, _event(event)) for event in timeline.events]
    return [row for _, _, row in sorted([*stages, *events], key=lambda each: each[:2])]


def end_s(timeline: Timeline) -> float:
    """Seconds from the arrival to the end, or until now."""
    return timeline.age_s if timeline.jct_s is None else timeline.jct_s


def _stage(span: StageSpan, attempts: int) -> Row:
    return Row(
        span.stage, span.iid, span.start_s, span.seconds, f"attempt {span.attempt}" if attempts > 1 else "", True
    )


def _event(event: TraceEvent) -> Row:
    return Row(event.kind, event.iid, event.at, event.seconds, detail(event))


def heading(timeline: Timeline) -> list[tuple[str, str]]:
    """What stands above the waterfall, as (title, text): the choice as a whole, and each mishap."""
    of = f" (choice {timeline.choice} of {timeline.choices})" if timeline.choices > 1 else ""
    state = f"{timeline.stage} now" if timeline.reason is None else timeline.reason
    tokens = f"{timeline.prompt_tokens} prompt   {timeline.outputs} output"
    latencies = {"TTFT": timeline.ttft_s, "TPOT": timeline.tpot_s, "JCT": timeline.jct_s}
    lines = [
        ("request", f"{choice_id(timeline.rid, timeline.choice)}{of}: {state}, arrived {ago(timeline.age_s)} ago"),
        ("latency", "   ".join(f"{name} {seconds(value)}" for name, value in latencies.items())),
        ("limits", f"{limits(timeline.slo)}   {_RESULTS.get(timeline.slo_result, timeline.slo_result)}".rstrip()),
        ("tokens", f"{tokens}   {count(timeline.attempts, 'attempt')}"),
    ]
    if timeline.receipt is not None:
        lines.append(("receipt", receipt(timeline.receipt)))
    if timeline.error:
        lines.append(("error", harmless(timeline.error)))
    mishaps = [event for event in timeline.events if event.kind in MISHAPS]
    lines += [(event.kind, f"at {seconds(event.at)}: {detail(event)}") for event in mishaps]
    if timeline.left_out:
        lines.append(("left out", f"{timeline.left_out} of its events and steps are not known"))
    return lines


def receipt(found: Receipt) -> str:
    """What happened to the KV of a request, in a sentence."""
    if found.adopted is None:
        return "the worker did not report one"
    moved = ""
    if found.chunks:  # of choices that share a transfer, one has its counts
        moved = f" as {amount(found.kv_bytes or 0)} of KV in {count(found.chunks, 'chunk')} over {found.transport}"
    parts = [
        f"{found.kept} of {count(found.prompt_tokens, 'prompt token')} {'local' if found.local else 'adopted'}{moved}",
        f"{found.recomputed} recomputed",
        *([f"preempted {count(found.preempted, 'time')}"] if found.preempted else []),
        *([f"{count(found.refetched, 'KV chunk')} fetched again"] if found.refetched else []),
        *([f"{count(found.continued, 'output token')} of earlier attempts continued"] if found.continued else []),
    ]
    return ", ".join(parts)


def steps(timeline: Timeline, width: int, plain: bool) -> Iterator[tuple[str, str]]:
    """The decode steps of each instance, as (title, text): how many, how long, beside what; then the slowest."""
    found = [step for step in timeline.steps if step.batch]  # not the end of prefill, which is among the chunks
    for iid in dict.fromkeys(step.iid for step in found):
        some = [step for step in found if step.iid == iid]
        passes = sum(step.passes for step in some)
        mean, most = sum(step.seconds for step in some) / passes, max(map(_pass_s, some))
        batch = sum(step.batch * step.passes for step in some) / passes
        beside = sum(step.chunk_tokens > 0 for step in some)
        chunks = f", {beside} with a prefill chunk" if beside else ""
        yield (
            "steps",
            f"{passes} on {iid}: mean {seconds(mean)}, longest {seconds(most)}, batch {number(batch)}{chunks}",
        )
        yield "", sparkline([*map(_pass_s, some)], width, plain)
    for step in sorted(found, key=_pass_s, reverse=True)[:SLOWEST]:
        chunk = f", beside {count(step.chunk_tokens, 'prompt token')}" if step.chunk_tokens else ""
        yield "slowest", f"{seconds(_pass_s(step))} at {seconds(step.start_s)} on {step.iid}, batch {step.batch}{chunk}"


def _pass_s(step: StepSpan) -> float:
    return step.seconds / max(step.passes, 1)


def drawn(timeline: Timeline, width: int, plain: bool) -> Group:
    """All there is to show, for a console of this width; `plain`: in ASCII."""
    from rich.console import Group
    from rich.text import Text

    shown_steps = steps(timeline, max(width - _TITLE - 1, 10), plain)
    return Group(_titled(heading(timeline)), Text(), _chart(timeline, width, plain), Text(), _titled(shown_steps))


def _titled(lines: Iterable[tuple[str, str]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(min_width=_TITLE)
    for title, text in lines:
        grid.add_row(title, Text(text), style="yellow" if title in MISHAPS else "")
    return grid


def _chart(timeline: Timeline, width: int, plain: bool) -> Table:
    """Stages and events as bars over one axis of time."""
    from rich.table import Table
    from rich.text import Text

    lines = rows(timeline)
    until = max([end_s(timeline), *(row.start_s + row.seconds for row in lines)]) or 1.0
    space = max(_BAR[0], min(width - 90, _BAR[1]))
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    for title, right in (("", False), ("on", False), ("at", True), ("took", True)):
        table.add_column(title, justify="right" if right else "left", no_wrap=True)
    table.add_column(f"0{seconds(until):>{space - 1}}", no_wrap=True)
    table.add_column("", overflow="fold")
    for row in lines:
        lasted = seconds(row.seconds) if row.stage or row.seconds else NOTHING
        line = bar((row.start_s + row.seconds) / until, space, max(row.start_s, 0.0) / until, plain)
        texts = (row.name if row.stage else f"  {row.name}", row.iid, seconds(row.start_s), lasted, line, row.detail)
        style = "bold" if row.stage else "yellow" if row.name in MISHAPS else "dim"
        table.add_row(*map(Text, texts), style=style)
    return table
