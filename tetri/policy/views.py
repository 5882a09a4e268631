"""Snapshots that policies decide on. Nothing in them changes while a policy looks at it, and policies change nothing.

The two pools are columns, not rows: a decision among a thousand instances draws and tests a few of them, and must
not build a thousand objects first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class PrefillPool:
    """The prefill instances as the broker sees them; column i is instance `iids[i]`. `queued_s`: predicted seconds of
    prefill work that was assigned to it and is not done. `last`: the column that was chosen last, -1 before the first;
    the pool's owner keeps it, so that `round_robin` has no memory of its own."""

    iids: list[str] = field(default_factory=list)
    queued_s: list[float] = field(default_factory=list)
    last: int = -1


@dataclass(frozen=True, slots=True)
class Need:
    """What a request will take on a decode instance: KV blocks now, KV blocks at its predicted end, and whether it is
    predicted to write more than `heavy_tokens`."""

    blocks: int
    end_blocks: int
    heavy: bool


@dataclass(slots=True)
class DecodePool:
    """The decode instances as a dispatcher sees them, corrected by its own offers that no report can contain yet.

    free    KV blocks in no account
    spare   free, less what the requests there are predicted to take in addition until they end
    heavy, light   requests there by predicted length, waiting or running
    last    the column that was chosen last, -1 before the first; kept by the pool's owner, for `round_robin`

    A column with less than `Need.blocks` free is never chosen, whatever the policy: to leave an instance out of one
    decision, its owner sets its `free` to -1 for as long.
    """

    iids: list[str] = field(default_factory=list)
    free: list[int] = field(default_factory=list)
    spare: list[int] = field(default_factory=list)
    heavy: list[int] = field(default_factory=list)
    light: list[int] = field(default_factory=list)
    last: int = -1


@dataclass(frozen=True, slots=True)
class QueuedPrompt:
    """A request in a prefill queue. `arrival` is its place in the order of arrival, `since` when it came, `work_s` the
    predicted seconds of its prefill, `due` its deadline or None; times are of the worker's clock."""

    key: str
    arrival: int
    tokens: int
    since: float = 0.0
    work_s: float = 0.0
    due: float | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a prompt is: tokens [done, goal) are still to be computed."""

    key: str
    done: int
    goal: int


@dataclass(frozen=True, slots=True)
class BatchMember:
    """A request in the running batch: it holds KV of `tokens` tokens and is predicted to end with `end`; at least one
    more than it has."""

    tokens: int
    end: int


@dataclass(frozen=True, slots=True)
class WaitingRequest:
    """A request whose KV has landed and which wants to run: `blocks` are its own already. `tokens` and `end` as of a
    Member; `landed` is its place in the order of landing."""

    key: str
    landed: int
    blocks: int
    tokens: int = 0
    end: int = 1


@dataclass(frozen=True, slots=True)
class BatchView:
    """The running batch of a decode instance and its memory. `free_blocks` are in no account, waiting requests' own
    blocks not included; it may be negative, since greedy admission overcommits."""

    running: Sequence[BatchMember]
    max_batch: int
    free_blocks: int
    block_tokens: int = 1


@dataclass(frozen=True, slots=True)
class InstanceState:
    """An instance as the transition watcher sees it. `idle_s`: how long it has had nothing to do. `low_s`: how long its
    load, the share of time in which it computed, has been under the threshold. `work_s`: predicted seconds of work in
    its queue (prefill) or until its requests have ended (decode). `queued` prompts; decodes `waiting` to run, with all
    their KV there, `running`, and `moving`: those whose KV is on its way, who do not wait for this instance. `stalled`:
    its prompts wait for a decode instance that takes them."""

    iid: str
    role: str
    idle_s: float
    low_s: float
    work_s: float
    queued: int
    waiting: int
    running: int = 0
    moving: int = 0
    stalled: bool = False


@dataclass(frozen=True, slots=True)
class FlipSettings:
    """`hold_s`: after a flip the watcher lets so long pass before the next one. `floor`: instances of each role that
    always remain (a mixed one counts for both). `gain`: `balance` flips only when one pool waits so many times as
    long."""

    idle_s: float = 60.0
    low_s: float = 60.0
    hold_s: float = 10.0
    floor: int = 1
    gain: float = 2.0


@dataclass(frozen=True, slots=True)
class RoleChange:
    """Let `iid` take new work as `role` from now on; `why` in a few words."""

    iid: str
    role: str
    why: str
