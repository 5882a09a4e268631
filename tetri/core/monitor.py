"""The monitor: collects the load of every instance in numbered cluster views, and its transition watcher decides when
an instance changes its role (paper, sections 3.2 and 3.5).

An instance is known from its first load report on; another incarnation replaces it. A silent instance stays in the
view, with the age of its report, until it counts as gone. The watcher sends a flip request to the broker, which carries
the flip out, and sees the result in the load reports; a request without effect is repeated. After each flip, requested
or seen, the watcher requests no other for `hold_s`. Whatever the policy, when no instance is left for a role, one of
the other role becomes mixed (a rescue), and returns to its own role when the missing role has instances again.
"""

from __future__ import annotations

from dataclasses import dataclass

from tetri.core.actions import BROKER, Action, Broken, MonitorInput, Publish, Send
from tetri.core.separation import Separation
from tetri.core.timers import Timers
from tetri.policy.flip import rescue
from tetri.policy.rules import FLIPS
from tetri.policy.views import FlipSettings, InstanceState
from tetri.request import DECODE_ROLES, PREFILL_ROLES, ROLES
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.load import Load
from tetri.wire.messages import ClusterView, FlipWanted, InstanceLoad, LoadReport

VIEW = "view"
# An engine with a model may take so long to start, so a role that no instance has had yet is not rescued before. The
# time must be shorter than `patience_s`: a restarted monitor does not know which roles were served, and requests wait.
START_S = 45.0
LOW = 0.1  # an instance with a lower share of busy time counts as lightly loaded (paper, section 3.5)
WINDOW_S = 5.0  # that share is smoothed over so long, so that a single step does not count as a high load


ROLES_OF = {"prefill": PREFILL_ROLES, "decode": DECODE_ROLES}


@dataclass(slots=True)
class Observed:
    """The newest load report of an instance, and its history. Times are in seconds of the monitor's clock.

    at        when the newest report arrived
    since     when the first report in this role arrived
    busy      smoothed share of time that the engine computes, 0 to 1
    idle_at   since when it has had no work; None while it has some
    low_at    since when its load has been low; None while it is not
    """

    incarnation: int
    role: str
    load: Load
    at: float
    since: float
    busy: float
    idle_at: float | None = None
    low_at: float | None = None

    def update(self, load: Load, now: float) -> None:
        """Apply a newer report of the same incarnation and role."""
        share = _share(load.busy)
        passed = now - self.at
        self.busy += (share - self.busy) * passed / (WINDOW_S + passed)
        self._record(load, now)

    def _record(self, load: Load, now: float) -> None:
        self.load, self.at = load, now
        if load.queued or load.waiting or load.running:
            self.idle_at = None
        elif self.idle_at is None or load.busy > 0:  # it has computed since its last report
            self.idle_at = now
        if self.busy >= LOW:
            self.low_at = None
        elif self.low_at is None:
            self.low_at = now

    @classmethod
    def of(cls, report: LoadReport, now: float) -> Observed:
        """Make the record of an instance from its first report in a role."""
        made = cls(report.incarnation, report.role, report.load, now, now, _share(report.load.busy))
        made._record(report.load, now)
        return made


class Monitor:
    """The monitor's core.

    flip       name of the watcher's policy; "none" disables it, except for rescues
    load_s     seconds between two views
    stale_s    an instance without a report for so long no longer counts as idle: its state is unknown
    gone_s     an instance without a report for so long is removed
    """

    def __init__(
        self,
        flip: str,
        settings: FlipSettings,
        epoch: int,
        load_s: float,
        now: float,
        stale_s: float = 1.0,
        gone_s: float = 5.0,
    ) -> None:
        self.settings, self.epoch = settings, epoch
        self.load_s, self.stale_s, self.gone_s = load_s, stale_s, gone_s
        self.instances: dict[str, Observed] = {}
        self.number = 0
        self.separation = Separation()
        self.timers: Timers[str] = Timers()
        self.rescued: dict[str, str] = {}  # instances that became mixed in a rescue -> their own role
        self.quiet_until = now + settings.hold_s  # no flip before, except a rescue
        self.rescue_at = now + gone_s  # no rescue before: some instances have not reported yet
        self.started_at = now + START_S
        self.served: dict[str, None] = {}  # roles that an instance has had
        self.flip, self._flip = flip, FLIPS[flip]
        self._watching = flip != "none"
        self.timers.set(VIEW, now)

    # ------------------------------------------------------------ the four verbs

    def handle(self, event: MonitorInput, now: float) -> list[Action]:
        """Handle an event. Raise Broken for one that a monitor never receives."""
        match event:
            case LoadReport():
                return self._report(event, now)
            case PeerUp() | PeerDown():
                return []  # the monitor relies on load reports only
        raise Broken(f"a monitor knows no {event}")

    def tick(self, now: float) -> list[Action]:
        """Publish a view and run the watcher, when they are due."""
        actions: list[Action] = []
        for _ in self.timers.due(now):
            self.timers.set(VIEW, now + self.load_s)
            self._remove_gone(now)
            actions += [self._view(now), *self._watch(now)]
        return actions

    def deadline(self) -> float | None:
        """Return when to call `tick` next."""
        return self.timers.next()

    def check(self) -> None:
        """Raise Broken when an invariant does not hold."""
        if VIEW not in self.timers:
            raise Broken("no next view is due")
        for iid, observed in self.instances.items():
            since = [when for when in (observed.idle_at, observed.low_at, observed.since) if when is not None]
            if any(when > observed.at for when in since) or not 0 <= observed.busy <= 1:
                raise Broken(f"{iid} has been so since after its last report, or its load is none: {observed}")
        unknown = [iid for iid in self.rescued if iid not in self.instances]
        if unknown:
            raise Broken(f"{unknown[0]} is held in both roles and unknown")

    # ------------------------------------------------------------ reports and views

    def _report(self, report: LoadReport, now: float) -> list[Action]:
        if report.role not in ROLES:
            return []  # an unknown role takes no part in flips
        observed = self.instances.get(report.iid)
        if observed is not None and (observed.incarnation, observed.role) == (report.incarnation, report.role):
            observed.update(report.load, now)
            return []
        if observed is not None and observed.role != report.role:
            self.quiet_until = now + self.settings.hold_s
        if observed is not None and (observed.incarnation != report.incarnation or observed.role == "mixed"):
            self.rescued.pop(report.iid, None)  # it has restarted, or was flipped after the rescue
        self.instances[report.iid] = Observed.of(report, now)
        self.served.update({role: None for role, serving in ROLES_OF.items() if report.role in serving})
        return [self._view(now)]

    def _view(self, now: float) -> Publish:
        self.number += 1
        known = self.instances.items()
        loads = [InstanceLoad(iid, each.incarnation, each.role, now - each.at, each.load) for iid, each in known]
        live = {iid: each for iid, each in known if now - each.at <= self.stale_s}  # one that is silent decodes nothing
        adaptive = {iid: each.load for iid, each in live.items() if each.role == "auto"}
        keeps = self.separation.look(adaptive, now)
        return Publish(ClusterView(epoch=self.epoch, number=self.number, loads=loads, flip=self.flip, keeps=keeps))

    def _remove_gone(self, now: float) -> None:
        gone = [iid for iid, observed in self.instances.items() if now - observed.at >= self.gone_s]
        for iid in gone:
            del self.instances[iid]
            self.rescued.pop(iid, None)

    # ------------------------------------------------------------ the transition watcher

    def _watch(self, now: float) -> list[Action]:
        wanted = self._rescue(now) or self._end_rescue(now) or self._apply_policy(now)
        if wanted is None:
            return []
        self.quiet_until = now + self.settings.hold_s
        return [Send(BROKER, wanted)]

    def _rescue(self, now: float) -> FlipWanted | None:
        """Return a flip to mixed when no instance is left for a role. This ignores `hold_s`, but is repeated only after
        `stale_s`. While a deployment starts there is no rescue, otherwise its first instance would become mixed."""
        if now < self.rescue_at:
            return None
        roles = {observed.role for observed in self.instances.values()}
        missing = [role for role, serving in ROLES_OF.items() if roles.isdisjoint(serving)]
        if not any(role in self.served or now >= self.started_at for role in missing):
            return None
        recent = {iid: observed for iid, observed in self.instances.items() if now - observed.at <= self.stale_s}
        change = rescue(self._states(now, recent or self.instances))  # a silent instance may be gone
        if change is None:
            return None
        self.rescue_at = now + self.stale_s
        self.rescued[change.iid] = self.instances[change.iid].role
        return FlipWanted(iid=change.iid, role=change.role, why=change.why)

    def _end_rescue(self, now: float) -> FlipWanted | None:
        """Return a flip that ends a rescue, when other instances have had the missing role for `hold_s`. An instance
        that has not become mixed `gone_s` after the request is no longer part of a rescue: if it becomes mixed later,
        that was not requested here."""
        if now < self.quiet_until:
            return None
        if now >= self.rescue_at + self.gone_s:
            self.rescued = {iid: own for iid, own in self.rescued.items() if self.instances[iid].role == "mixed"}
        for iid, role in self.rescued.items():
            serving, missing = (DECODE_ROLES, "decode") if role == "prefill" else (PREFILL_ROLES, "prefill")
            others = [
                each for name, each in self.instances.items() if name not in self.rescued and each.role in serving
            ]
            settled = [other for other in others if now - other.since >= self.settings.hold_s]
            if self.instances[iid].role == "mixed" and len(settled) >= max(self.settings.floor, 1):
                return FlipWanted(iid=iid, role=role, why=f"{missing} has its own instances again")
        return None

    def _apply_policy(self, now: float) -> FlipWanted | None:
        """Return the flip that the policy chooses, if any."""
        if now < self.quiet_until or not self._watching:
            return None
        change = self._flip(self._states(now, self.instances), self.settings)
        return None if change is None else FlipWanted(iid=change.iid, role=change.role, why=change.why)

    def _states(self, now: float, instances: dict[str, Observed]) -> list[InstanceState]:
        """Return the input of the flip policies. A silent instance does not count as idle: it may be in a long step."""
        return [
            InstanceState(
                iid=iid,
                role=observed.role,
                idle_s=self._elapsed(observed.idle_at, observed, now),
                low_s=self._elapsed(observed.low_at, observed, now),
                work_s=observed.load.queued_s + observed.load.decode_s,
                queued=observed.load.queued,
                waiting=observed.load.landed,
                running=observed.load.running,
                moving=max(observed.load.waiting - observed.load.landed, 0),
                stalled=observed.load.stalled,
            )
            for iid, observed in instances.items()
        ]

    def _elapsed(self, when: float | None, observed: Observed, now: float) -> float:
        stale = now - observed.at > self.stale_s
        return 0.0 if when is None or stale else now - when


def _share(busy: float) -> float:
    """Clamp a reported share of time to 0..1; NaN becomes 0."""
    return min(max(0.0, busy), 1.0)
