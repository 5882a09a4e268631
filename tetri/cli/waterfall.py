"""A Timeline as lines of text: what happened, where, when, and for how long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from tetri.cli.units import NOTHING, ago, amount, bar, count, number, seconds, sparkline
from tetri.request import Receipt, choice_id
from tetri.terminal import harmless
from tetri.wire.observation import StageSpan, StepSpan, Timeline, TraceEvent

if TYPE_CHECKING:
    from rich.console import Group

MISHAPS = ("retry", "migrated", "preempted", "refused")  # what makes a request late
SLOWEST = 5  # decode steps that are shown one by one
_BAR = (12, 60)  # least and most characters


def _tokens(event: TraceEvent) -> str:
    beside = event.size - (event.last - event.first)
    return f"tokens {event.first} to {event.last}" + (f", beside {count(beside, 'other')}" if beside > 0 else "")


def _fetch(event: TraceEvent) -> str:
    speed = f", {amount(event.size / event.seconds)}/s" if event.size and event.seconds > 0 else ""
    return f"blocks {event.first} to {event.last}, {amount(event.size)}{speed}, {event.note} from {event.peer}"


_DETAIL: dict[str, Callable[[TraceEvent], str]] = {
    "chunk": _tokens,
    "recompute": _tokens,
    "offered": lambda e: f"KV to {e.peer}",
    "granted": lambda e: f"{e.peer} has reserved memory",
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


def heading(timeline: Timeline) -> list[str]:
    """The lines above the waterfall: how the choice was served as a whole, and each mishap."""
    name = choice_id(timeline.rid, timeline.choice)
    of = f" (choice {timeline.choice} of {timeline.choices})" if timeline.choices > 1 else ""
    arrived = f"arrived {ago(timeline.age_s)} ago"
    state = f"{timeline.stage} now" if timeline.reason is None else timeline.reason
    outputs, jct, ttft = timeline.outputs, timeline.jct_s, timeline.ttft_s
    tpot = (jct - ttft) / (outputs - 1) if jct is not None and ttft is not None and outputs > 1 else None
    lines = [
        f"request   {name}{of}: {state}, {arrived}",
        f"latency   TTFT {seconds(ttft)}   TPOT {seconds(tpot)}   JCT {seconds(jct)}",
        f"tokens    {timeline.prompt_tokens} prompt   {outputs} output   {count(timeline.attempts, 'attempt')}",
    ]
    if timeline.receipt is not None:
        lines.append(f"receipt   {receipt(timeline.receipt)}")
    if timeline.error:
        lines.append(f"error     {harmless(timeline.error)}")
    lines += [
        f"{each.kind:<9} at {seconds(each.at)}: {detail(each)}" for each in timeline.events if each.kind in MISHAPS
    ]
    if timeline.left_out:
        lines.append(f"left out  {timeline.left_out} of its events and steps, more than are kept")
    return lines


def receipt(found: Receipt) -> str:
    """What happened to the KV of a request, in a sentence."""
    if found.adopted is None:
        return "the worker did not report one"
    moved = f"as {amount(found.kv_bytes or 0)} of KV in {count(found.chunks or 0, 'chunk')} over {found.transport}"
    parts = [
        f"{found.adopted} of {count(found.prompt_tokens, 'prompt token')} adopted {moved}",
        f"{found.recomputed} recomputed",
        *([f"preempted {count(found.preempted, 'time')}"] if found.preempted else []),
        *([f"{count(found.refetched, 'KV chunk')} fetched again"] if found.refetched else []),
        *([f"{count(found.continued, 'output token')} of earlier attempts continued"] if found.continued else []),
    ]
    return ", ".join(parts)


def steps(timeline: Timeline, width: int, plain: bool) -> Iterator[str]:
    """The decode steps of each instance: how many, how long, beside what; all as a sparkline; the slowest."""
    by_instance: dict[str, list[StepSpan]] = {}
    for step in timeline.steps:
        by_instance.setdefault(step.iid, []).append(step)
    for iid, some in by_instance.items():
        passes = sum(step.passes for step in some)
        mean, most = sum(step.seconds for step in some) / passes, max(map(_pass_s, some))
        batch = sum(step.batch * step.passes for step in some) / passes
        beside = sum(step.chunk_tokens > 0 for step in some)
        yield (
            f"steps     {passes} on {iid}: mean {seconds(mean)}, longest {seconds(most)}, mean batch {number(batch)}"
            f"{f', {beside} with a prefill chunk' if beside else ''}"
        )
        yield f"          {sparkline([*map(_pass_s, some)], max(width - 10, 10), plain)}"
    for step in sorted(timeline.steps, key=_pass_s, reverse=True)[:SLOWEST]:
        chunk = f", beside {count(step.chunk_tokens, 'prompt token')}" if step.chunk_tokens else ""
        yield f"slowest   {seconds(_pass_s(step))} at {seconds(step.start_s)} on {step.iid}, batch {step.batch}{chunk}"


def _pass_s(step: StepSpan) -> float:
    return step.seconds / max(step.passes, 1)


def drawn(timeline: Timeline, width: int, plain: bool) -> Group:
    """The waterfall for a console of this width; `plain`: in ASCII."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    until = max([end_s(timeline), *(each.start_s + each.seconds for each in rows(timeline))]) or 1.0
    space = max(_BAR[0], min(width - 68, _BAR[1]))
    axis = f"0{seconds(until):>{space - 1}}"
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    for title, right in (("", False), ("on", False), ("at", True), ("took", True)):
        table.add_column(title, justify="right" if right else "left", no_wrap=True)
    table.add_column(axis, no_wrap=True)
    table.add_column("", overflow="fold")
    for row in rows(timeline):
        took = seconds(row.seconds) if row.stage or row.seconds else NOTHING
        line = bar((row.start_s + row.seconds) / until, space, max(row.start_s, 0.0) / until, plain)
        texts = (row.name if row.stage else f"  {row.name}", row.iid, seconds(row.start_s), took, line, row.detail)
        style = "bold" if row.stage else "yellow" if row.name in MISHAPS else "dim"
        table.add_row(*(Text(text) for text in texts), style=style)
    lines = [Text(line, "yellow" if line.startswith(MISHAPS) else "") for line in heading(timeline)]
    return Group(*lines, Text(), table, Text(), *map(Text, steps(timeline, width, plain)))
