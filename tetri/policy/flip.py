"""Which instance changes its role (paper, section 3.5: the transition watcher's policies).

How long the watcher waits after a flip (`FlipSettings.hold_s`) is the monitor's business, which knows when it was.
"""

from __future__ import annotations

from collections.abc import Sequence

from tetri.policy.views import FlipSettings, InstanceState, RoleChange


def none(states: Sequence[InstanceState], settings: FlipSettings) -> RoleChange | None:
    """Nobody flips by itself."""
    return None


def rescue(states: Sequence[InstanceState]) -> RoleChange | None:
    """When nobody is left for a role: the instance of the other role with the least work does both from now on. None
    while both roles are served, or when nobody is there at all."""
    served = {role: any(state.role in (role, "mixed") for state in states) for role in ("prefill", "decode")}
    for role, other in (("prefill", "decode"), ("decode", "prefill")):
        if not served[role] and served[other]:
            least = min(states, key=lambda state: state.work_s)
            return RoleChange(least.iid, "mixed", f"no {role} instance is left")
    return None
