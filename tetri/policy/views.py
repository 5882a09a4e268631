"""Snapshots that policies decide on. A policy does not change them, and they do not change while it runs.

The two pools are stored as columns: a decision among a thousand instances tests only a few of them and must not build
a thousand objects first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tetri.request import Value


@dataclass(slots=True)
class PrefillPool:
    """The prefill instances as the broker sees them; column i is instance `iids[i]`. `queued_s`: predicted seconds of
    prefill work that is assigned to it and not done. `share`: the share of its time that prefill gets there while its
    decodes keep their limits of TPOT. `requests`: the open requests of an adaptive instance that decodes, and 1; 0
    for any other. `ttft_s`: seconds that are left until the first token of the request is late, infinite without a
    limit. `last`: the column chosen last, -1 before the first choice; the pool's owner maintains it for
    `round_robin`."""

    iids: list[str] = field(default_factory=list)
    queued_s: list[float] = field(default_factory=list)
    share: list[float] = field(default_factory=list)
    requests: list[int] = field(default_factory=list)
    ttft_s: float = 0.0
    last: int = -1


class Need(Value, frozen=True):
    """What a request needs on a decode instance: KV blocks now, KV blocks at its predicted end, and whether it is
    predicted to write more than `heavy_tokens` tokens. `choices`: as how many requests it counts there."""

    blocks: int
    end_blocks: int
    heavy: bool
    choices: int = 1


EXCLUDED = -(1 << 62)  # `DecodePool.free` of an instance that must not be chosen


@dataclass(slots=True)
class DecodePool:
    """The decode instances as a dispatcher sees them, corrected by its own offers that no load report includes yet.

    free    KV blocks in no account, less those that deferred offers wait for: negative if these need more
    spare   free blocks, less those that the instance's requests are predicted to need in addition until they end
    heavy   waiting and running requests that are predicted to be heavy
    light   the other waiting and running requests
    most    KV blocks of the instance: its deferred offers may lack as many
    last    the column chosen last, -1 before the first choice; the pool's owner maintains it for `round_robin`
    step_s  predicted seconds of a decode step with all its requests
    home    the column of the adaptive instance that prefills the request; -1 if its role is another, or it takes no
            decodes now

    No policy chooses a column with fewer than `Need.blocks` free blocks. To exclude an instance from a decision, the
    owner sets its `free` to EXCLUDED meanwhile.
    """

    iids: list[str] = field(default_factory=list)
    free: list[int] = field(default_factory=list)
    spare: list[int] = field(default_factory=list)
    heavy: list[int] = field(default_factory=list)
    light: list[int] = field(default_factory=list)
    most: list[int] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    last: int = -1
    home: int = -1


class QueuedPrompt(Value, frozen=True):
    """A request in a prefill queue. `arrival`: its position in the order of arrival. `since`: its time of arrival.
    `work_s`: predicted seconds of its prefill. `due`: when its first token is late by its limit of TTFT, or the whole
    request by its deadline, whichever comes first; None without either. Times are seconds of the worker's clock."""

    key: str
    arrival: int
    tokens: int
    since: float = 0.0
    work_s: float = 0.0
    due: float | None = None


class Progress(Value, frozen=True):
    """Progress of a prompt: tokens [done, goal) are not computed yet."""

    key: str
    done: int
    goal: int


class MixedStep(Value, frozen=True):
    """A step with a chunk beside running decodes.

    batch, context  decodes in it, and the tokens that they have in total
    slack_s         seconds that it may take so that the decodes keep their limits of TPOT; infinite without limits
    pressed         whether a queued prompt must be computed soon, to keep its limit of TTFT
    start           tokens before the chunk in its prompt
    ends            sizes of the chunk with which it ends a queued prompt
    """

    batch: int
    context: int
    slack_s: float
    pressed: bool = False
    start: int = 0
    ends: tuple[int, ...] = ()


class ClusterLoad(Value, frozen=True):
    """What the adaptive instances do together, over the last seconds.

    instances   how many there are
    prefill     seconds of prefill that arrive in a second, predicted for chunks without decodes
    requests    that arrive in a second
    output      tokens that a request writes, on average
    context     tokens of all requests that decode or wait for it
    kv_tokens   that one instance holds
    mean_s, long_s    seconds of the prefill of a prompt: the mean, and that of a long one
    base_s, request_s a decode step takes base_s, and request_s more for each request in it
    beside      time that a chunk adds to a decode step, over that of the chunk alone
    ttft_s, tpot_s    the limits
    """

    instances: int
    prefill: float
    requests: float
    output: float
    context: int
    kv_tokens: int
    mean_s: float
    long_s: float
    base_s: float
    request_s: float
    beside: float
    ttft_s: float
    tpot_s: float


class BatchMember(Value, frozen=True):
    """A request in the running batch. It holds the KV of `tokens` tokens and is predicted to end with `end` tokens, at
    least one more."""

    tokens: int
    end: int


class WaitingRequest(Value, frozen=True):
    """A request whose KV has landed and that waits for admission. `landed`: its position in the order of landing.
    `blocks`: KV blocks that it owns. `tokens` and `end`: as in BatchMember. `due`: when its next token is late, by its
    limit of TPOT; without one, when it had its first token."""

    key: str
    landed: int
    blocks: int
    tokens: int = 0
    end: int = 1
    due: float = 0.0


class BatchView(Value, frozen=True):
    """The running batch of a decode instance and its memory. `free_blocks`: KV blocks in no account, so without those
    of waiting requests; negative if greedy admission has overcommitted."""

    running: Sequence[BatchMember]
    max_batch: int
    free_blocks: int
    block_tokens: int = 1


class RunningDecode(Value, frozen=True):
    """A running decode. It holds `blocks` KV blocks; another instance that takes it must have `needs`. `left`: most
    tokens that it may still write."""

    id: str
    blocks: int
    needs: int
    left: int


@dataclass(frozen=True, slots=True)
class DecodeInstance:
    """An instance that runs decodes, or may take some.

    free_blocks     its free KV blocks, without those that decodes on their way to it need
    running         its batch
    places          decodes that it can still take into its batch, without those on their way
    outgoing         decodes on their way from it
    outgoing_blocks  the blocks of these
    """

    iid: str
    role: str
    free_blocks: int
    running: int
    places: int
    outgoing: int = 0
    outgoing_blocks: int = 0


@dataclass(frozen=True, slots=True)
class InstanceState:
    """An instance as the transition watcher sees it.

    idle_s   seconds since it last had a request
    low_s    seconds for which its load, the share of time in which it computed, has been under the threshold
    work_s   predicted seconds of work in its queue (prefill), or until its requests have ended (decode)
    queued   prompts in its prefill queue
    waiting  decode requests with all KV that wait for admission
    running  decode requests in the batch
    moving   decode requests whose KV is still being moved
    stalled  whether its prompts wait for a decode instance to grant them
    """

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
    """Settings of the flip policies.

    idle_s  of `idle`: seconds of idleness before a flip
    low_s   of `below`: seconds of low load before a flip
    hold_s  least seconds between two flips
    floor   least number of instances of each role; a mixed or auto one counts for both
    gain    of `balance`: least ratio between the waits of the two pools
    """

    idle_s: float = 60.0
    low_s: float = 60.0
    hold_s: float = 10.0
    floor: int = 1
    gain: float = 2.0


@dataclass(frozen=True, slots=True)
class RoleChange:
    """The decision to flip instance `iid` to `role`; `why`: the reason in a few words."""

    iid: str
    role: str
    why: str
