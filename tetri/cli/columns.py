"""What `status` and `top` show of an instance: the titles and units of its columns, in one place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from tetri.cli.units import NOTHING, number, ratio, seconds, share
from tetri.wire.clients import InstanceStatus
from tetri.wire.observation import Activity


class Column(NamedTuple):
    """`text`: the cell of an instance, whose steps are counted in the Activity beside it: since its process started, or
    in the last seconds."""

    title: str
    text: Callable[[InstanceStatus, Activity], str]
    right: bool = True  # a number, which is aligned to the right


INSTANCE = Column("instance", lambda i, a: i.iid, False)
ROLE = Column("role", lambda i, a: f"{i.role} ({i.keeps})" if i.keeps else i.role, False)
STATE = Column("state", lambda i, a: i.state, False)
QUEUED = Column("queued", lambda i, a: f"{i.load.queued}")
QUEUE_TIME = Column("queue time", lambda i, a: seconds(i.load.queued_s))
FILL = Column("fill", lambda i, a: share(a.chunk_tokens, a.chunk_space))
WAITING = Column("waiting", lambda i, a: f"{i.load.waiting}")
RUNNING = Column("running", lambda i, a: f"{i.load.running}")
HEAVY = Column("heavy", lambda i, a: f"{i.load.heavy}")
BATCH = Column("batch", lambda i, a: number(a.decode_tokens / a.decode_steps) if a.decode_steps else NOTHING)
KV_USED = Column("KV used", lambda i, a: share(i.blocks - max(i.load.free_blocks, 0), i.blocks))
BLOCKS = Column("blocks", lambda i, a: f"{i.blocks}")
BUSY = Column("busy", lambda i, a: f"{i.load.busy:.0%}" if i.state == "ready" else NOTHING)
HELD = Column("held", lambda i, a: f"{i.held}")
RATIO = Column("step ratio", lambda i, a: _ratios(i), False)
PREFILL_RATIO = Column("step ratio", lambda i, a: ratio(i.step_ratio.prefill))
DECODE_RATIO = Column("step ratio", lambda i, a: ratio(i.step_ratio.decode))
KV = Column("KV paths", lambda i, a: counted(i.paths, ""), False)
NOTE = Column("note", lambda i, a: i.note, False)

#: Column -> what it tells, for the help of the commands.
MEANING = {
    QUEUED: "prompts in the prefill queue",
    QUEUE_TIME: "how long it will take to compute them, as predicted",
    FILL: "how full its chunks are, in prompt tokens",
    WAITING: "decode requests that it was offered, not in its batch yet",
    RUNNING: "decode requests in its batch",
    HEAVY: "waiting and running requests that are predicted to be heavy",
    BATCH: "mean output tokens of a decode step",
    BLOCKS: "KV blocks that it has",
    KV_USED: "KV blocks that are not free",
    BUSY: "share of time in which the engine computed",
    HELD: "requests that it has in any stage",
    RATIO: "measured over predicted time of a step",
    KV: "how it exchanges KV, and with how many instances",
}


def counted(counts: dict[str, int], nothing: str = "none") -> str:
    """Numbers by name, on one line."""
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or nothing


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines of text, with columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def cells(columns: Sequence[Column], instance: InstanceStatus, activity: Activity | None = None) -> list[str]:
    """The cells of an instance; `activity`: that of the last seconds, else since its process started."""
    return [column.text(instance, activity or instance.activity) for column in columns]


def meanings(columns: Sequence[Column]) -> str:
    """The titles of these columns and what they tell, for the help of a command."""
    titles = {column.title for column in columns}
    lines = (f"{column.title:<12}{text}" for column, text in MEANING.items() if column.title in titles)
    return "\n".join(["\b", *lines])


def _ratios(instance: InstanceStatus) -> str:
    found = {"prefill": instance.step_ratio.prefill, "decode": instance.step_ratio.decode}
    return ", ".join(f"{phase} {ratio(value)}" for phase, value in found.items() if value is not None)
