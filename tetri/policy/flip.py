"""Flip policies of the transition watcher: which instance changes its role (paper, section 3.5).

All policies follow the same rules. Prefill flips to decode and decode to prefill; an instance that serves both, mixed
or auto, stays as it is. Each role keeps `floor` instances, those that serve both included. No instance flips to a pool
that does not need it: without load, idle instances would flip back and forth for ever. The monitor, not the policy,
enforces the wait after a flip (`hold_s`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tetri.policy.views import FlipSettings, InstanceState, RoleChange
from tetri.request import DECODE_ROLES, PREFILL_ROLES

OTHER = {"prefill": "decode", "decode": "prefill"}
SERVING = {"prefill": PREFILL_ROLES, "decode": DECODE_ROLES}
WORTH_S = 1.0  # least predicted wait for which `balance` flips: a shorter one is over before the flip helps


def none(states: Sequence[InstanceState], settings: FlipSettings) -> RoleChange | None:
    """No instance flips unless an operator asks for it."""
    return None


def idle(states: Sequence[InstanceState], settings: FlipSettings) -> RoleChange | None:
    """The instance that has been idle for the longest time, at least `idle_s` (the paper's evaluation: one minute), if
    the other pool is busy: an instance in it has waiting requests, or all of its instances compute."""
    return _longest(states, settings, lambda state: state.idle_s, settings.idle_s, "idle")


def below(states: Sequence[InstanceState], settings: FlipSettings) -> RoleChange | None:
    """The instance whose load has been under the threshold for the longest time, at least `low_s` (the paper's example:
    under 10 % for the past minute), if the other pool is busy, as in `idle`. The instance finishes its requests in the
    new role."""
    return _longest(states, settings, lambda state: state.low_s, settings.low_s, "hardly loaded")


def balance(states: Sequence[InstanceState], settings: FlipSettings) -> RoleChange | None:
    """If the predicted wait of one pool is `gain` times that of the other and more than a second, the instance of the
    other pool with the least work. No flip if it would only reverse the imbalance, with the same work on one instance
    more and one less. Not in the paper.

    The predicted wait of a pool is the mean over its instances of predicted work, weighted by the share of the
    instance's requests that wait for this role. For prefill these are all queued prompts. For decode these are all
    requests except the running ones: if none waits, a new one starts at once, however long the others take. Requests
    whose KV is still being moved count, since they predict the load to come; without them hardly any instance would
    flip back from prefill."""
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
    """If no instance is left for a role, the instance with the least work becomes mixed rather than flips, since it may
    be the last of its own role. None while both roles are served, or if there are no instances."""
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
    """The instance that may flip and whose `seconds` are the most and at least `least`, on a tie the first."""
    long = [state for state in states if state.role in OTHER and seconds(state) >= least]
    spare = [state for state in long if len(_serving(states, state.role)) > settings.floor]
    able = [state for state in spare if _busy(states, OTHER[state.role])]
    if not able:
        return None
    chosen = max(able, key=seconds)
    return RoleChange(chosen.iid, OTHER[chosen.role], f"{what} for {seconds(chosen):.0f} s")


def _serving(states: Sequence[InstanceState], role: str) -> list[InstanceState]:
    return [state for state in states if state.role in SERVING[role]]


def _busy(states: Sequence[InstanceState], role: str) -> bool:
    pool = _serving(states, role)
    return any(_queue(state, role) for state in pool) or all(state.idle_s == 0 for state in pool)


def _wait_s(states: Sequence[InstanceState], role: str) -> float:
    """Predicted wait of the pool of this role, which must not be empty, in seconds. The work of stalled prompts counts
    as wait for decode: they wait for a decode instance to grant them, so more prefill instances would not help."""
    pool = _serving(states, role)
    stalled = [state.work_s for state in states if state.stalled] if role == "decode" else []
    return (sum(stalled) + sum(_share(state, role) * state.work_s for state in pool)) / len(pool)


def _share(state: InstanceState, role: str) -> float:
    """The share of an instance's requests that wait for this role."""
    waiting = state.waiting + state.moving if role == "decode" else state.queued * (not state.stalled)
    return waiting / max(state.queued + state.waiting + state.running + state.moving, 1)


def _queue(state: InstanceState, role: str) -> int:
    return state.queued if role == "prefill" else state.waiting
