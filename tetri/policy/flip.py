"""Which instance changes its role (paper, section 3.5: the transition watcher's policies).

Where they agree. An instance of one role takes the other; a mixed one serves both already and stays as it is. Each
role keeps `floor` instances, mixed ones counted. And nobody flips towards a pool that has no use for it: with work
nowhere, idle instances would go back and forth for ever. How long the watcher waits after a flip (`hold_s`) is the
monitor's business, which knows when that was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tetri.policy.views import FlipSettings, InstanceState, RoleChange

OTHER = {"prefill": "decode", "decode": "prefill"}
WORTH_S = 1.0  # `balance` leaves a shorter wait alone: a flip would come too late for it


def none(states: Sequence[InstanceState], settings: FlipSettings) -> RoleChange | None:
    """Nobody flips by itself."""
    return None


def idle(states: Sequence[InstanceState], settings: FlipSettings) -> RoleChange | None:
    """The instance that has had nothing to do for the longest time, at least `idle_s`, if the other pool is busy (the
    paper's evaluation: one minute). A pool is busy when somebody in it has requests that wait, or all compute."""
    return _longest(states, settings, lambda state: state.idle_s, settings.idle_s, "idle")


def below(states: Sequence[InstanceState], settings: FlipSettings) -> RoleChange | None:
    """The instance whose load has been under the threshold for the longest time, at least `low_s`, if the other pool
    is busy (the paper's example: under 10 % for the past minute). Busy as with `idle`. What it still does, it finishes
    in its new role."""
    return _longest(states, settings, lambda state: state.low_s, settings.low_s, "hardly loaded")


def balance(states: Sequence[InstanceState], settings: FlipSettings) -> RoleChange | None:
    """When requests wait `gain` times as long for one pool as for the other, and longer than a second: the instance of
    the other with the least work. Not when that would only turn the scales, with the same work on one instance more
    and one less. Not in the paper.

    The predicted queueing time of a pool is the mean over its instances of their predicted work, each times the share
    of its requests that wait for this role. A prefill instance has only such. Of decodes all but those that run: with
    nobody waiting a new one starts at once, however long the others take. Those whose KV is on its way count, for they
    tell what comes; without them next to nothing ever called an instance back from prefill."""
    for role, donor in OTHER.items():
        pool, giving = _serving(states, role), _serving(states, donor)
        if not pool or len(giving) <= settings.floor:
            continue
        long, short = _wait_s(states, role), _wait_s(states, donor)
        after = long * len(pool) / (len(pool) + 1), short * len(giving) / (len(giving) - 1)
        able = [state for state in giving if state.role == donor]
        if able and long > WORTH_S and long >= settings.gain * short and after[0] >= after[1]:
            chosen = min(able, key=lambda state: state.work_s)
            return RoleChange(chosen.iid, role, f"{role} waits {long:.1f} s, {donor} {short:.1f} s")
    return None


def rescue(states: Sequence[InstanceState]) -> RoleChange | None:
    """When nobody is left for a role: the instance of the other role with the least work does both from now on, since
    its own role may have nobody else either. None while both roles are served, and when nobody is there at all."""
    for role in OTHER:
        if states and not _serving(states, role):
            chosen = min(states, key=lambda state: state.work_s)
            return RoleChange(chosen.iid, "mixed", f"no {role} instance is left")
    return None


def _longest(
    states: Sequence[InstanceState],
    settings: FlipSettings,
    seconds: Callable[[InstanceState], float],
    least: float,
    what: str,
) -> RoleChange | None:
    """The one that may flip and has been so for the longest time, the first of equals."""
    able = [
        state
        for state in states
        if state.role in OTHER
        and seconds(state) >= least
        and len(_serving(states, state.role)) > settings.floor
        and _busy(states, OTHER[state.role])
    ]
    if not able:
        return None
    chosen = max(able, key=seconds)
    return RoleChange(chosen.iid, OTHER[chosen.role], f"{what} for {seconds(chosen):.0f} s")


def _serving(states: Sequence[InstanceState], role: str) -> list[InstanceState]:
    return [state for state in states if state.role in (role, "mixed")]


def _busy(states: Sequence[InstanceState], role: str) -> bool:
    pool = _serving(states, role)
    return any(_queue(state, role) for state in pool) or all(state.idle_s == 0 for state in pool)


def _wait_s(states: Sequence[InstanceState], role: str) -> float:
    """Of the pool of this role, which is not empty. Prompts that no decode instance takes wait for decode, at least as
    long as they will be computed: else the pool would be helped that can do nothing."""
    pool = _serving(states, role)
    stalled = [state.work_s for state in states if state.stalled] if role == "decode" else []
    return (sum(stalled) + sum(_share(state, role) * state.work_s for state in pool)) / len(pool)


def _share(state: InstanceState, role: str) -> float:
    """Of an instance's requests, those that wait for this role."""
    waiting = state.waiting + state.moving if role == "decode" else state.queued * (not state.stalled)
    return waiting / max(state.queued + state.waiting + state.running + state.moving, 1)


def _queue(state: InstanceState, role: str) -> int:
    return state.queued if role == "prefill" else state.waiting
