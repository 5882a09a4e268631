"""The monitor's core: the load of every instance in one numbered view, and the transition watcher, which decides when
an instance changes its role (paper, sections 3.2 and 3.5).

It knows an instance from its first report on; another incarnation replaces it. An instance that is silent stays in the
view, with its report's age, until it counts as gone. The watcher asks the broker, which carries a flip out, and sees it
in the reports; a wish that nobody fulfils comes again. After a role change seen or wished it leaves all as it is for
`hold_s`. Whatever the policy: when nobody is left for a role, somebody of the other takes both, and gives that up
when the missing role has its own instances again.
"""

from __future__ import annotations

from dataclasses import dataclass

from tetri.core.actions import BROKER, Action, Broken, MonitorInput, Publish, Send
from tetri.core.timers import Timers
from tetri.policy.flip import rescue
from tetri.policy.rules import FLIPS
from tetri.policy.views import FlipSettings, InstanceState
from tetri.request import DECODE_ROLES, PREFILL_ROLES, ROLES
from tetri.wire.events import PeerDown, PeerUp
from tetri.wire.messages import ClusterView, FlipWanted, InstanceLoad, Load, LoadReport

VIEW = "view"
# An engine with a model may take so long to start: a role that nobody has had yet is not missed before. But a monitor
# that was restarted has not seen who had it, and requests wait for it no longer than a minute (`patience_s`).
START_S = 45.0
LOW = 0.1  # share of time computed under which an instance counts as hardly loaded (paper, section 3.5)
WINDOW_S = 5.0  # that share is smoothed over so long: a step now and then is a low load, not a high one


ROLES_OF = {"prefill": PREFILL_ROLES, "decode": DECODE_ROLES}


@dataclass(slots=True)
class Observed:
    """What the newest report of an instance said, and since when things have been so. `since`: when it was first heard
    of in this role. `idle_at`, `low_at`: since when it has had nothing to do, a low load; None while it is not so."""

    incarnation: int
    role: str
    load: Load
    at: float
    since: float
    busy: float
    idle_at: float | None = None
    low_at: float | None = None

    def update(self, load: Load, now: float) -> None:
        share = _share(load.busy)
        passed = now - self.at
        self.busy += (share - self.busy) * passed / (WINDOW_S + passed)
        self._record(load, now)

    def _record(self, load: Load, now: float) -> None:
        self.load, self.at = load, now
        if load.queued or load.waiting or load.running:
            self.idle_at = None
        elif self.idle_at is None or load.busy > 0:  # it has computed since the report before
            self.idle_at = now
        if self.busy >= LOW:
            self.low_at = None
        elif self.low_at is None:
            self.low_at = now

    @classmethod
    def of(cls, report: LoadReport, now: float) -> Observed:
        made = cls(report.incarnation, report.role, report.load, now, now, _share(report.load.busy))
        made._record(report.load, now)
        return made


class Monitor:
    """`flip` names the policy of the watcher. `load_s`: between two views. Without a report for `stale_s` nobody knows
    what an instance does, so it does not count as idle; without one for `gone_s` it is left out."""

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
        self.timers: Timers[str] = Timers()
        self.rescued: dict[str, str] = {}  # who took the other role too in need, and its own role
        self.quiet_until = now + settings.hold_s  # the watcher leaves all as it is
        self.rescue_at = now + gone_s  # before, not everybody who is there has been heard
        self.started_at = now + START_S
        self.served: dict[str, None] = {}  # roles that somebody has had
        self.flip, self._flip = flip, FLIPS[flip]
        self._watching = flip != "none"
        self.timers.set(VIEW, now)

    # ------------------------------------------------------------ the four verbs

    def handle(self, event: MonitorInput, now: float) -> list[Action]:
        match event:
            case LoadReport():
                return self._report(event, now)
            case PeerUp() | PeerDown():
                return []  # reports, or their absence, tell all that counts
        raise Broken(f"a monitor knows no {event}")

    def tick(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for _ in self.timers.due(now):
            self.timers.set(VIEW, now + self.load_s)
            self._leave_out(now)
            actions += [self._view(now), *self._watch(now)]
        return actions

    def deadline(self) -> float | None:
        return self.timers.next()

    def check(self) -> None:
        if VIEW not in self.timers:
            raise Broken("no next view is due")
        for iid, observed in self.instances.items():
            since = [when for when in (observed.idle_at, observed.low_at, observed.since) if when is not None]
            if any(when > observed.at for when in since) or not 0 <= observed.busy <= 1:
                raise Broken(f"{iid} has been so since after its last report, or its load is none: {observed}")
        strange = [iid for iid in self.rescued if iid not in self.instances]
        if strange:
            raise Broken(f"{strange[0]} is held in both roles and unknown")

    # ------------------------------------------------------------ reports and views

    def _report(self, report: LoadReport, now: float) -> list[Action]:
        if report.role not in ROLES:
            return []  # nobody flips to it or from it
        observed = self.instances.get(report.iid)
        if observed is not None and (observed.incarnation, observed.role) == (report.incarnation, report.role):
            observed.update(report.load, now)
            return []
        if observed is not None and observed.role != report.role:
            self.quiet_until = now + self.settings.hold_s
        if observed is not None and (observed.incarnation != report.incarnation or observed.role == "mixed"):
            self.rescued.pop(report.iid, None)  # it has begun anew, or has been changed since
        self.instances[report.iid] = Observed.of(report, now)
        self.served.update({role: None for role, serving in ROLES_OF.items() if report.role in serving})
        return [self._view(now)]

    def _view(self, now: float) -> Publish:
        self.number += 1
        loads = [
            InstanceLoad(iid, observed.incarnation, observed.role, now - observed.at, observed.load)
            for iid, observed in self.instances.items()
        ]
        return Publish(ClusterView(epoch=self.epoch, number=self.number, loads=loads, flip=self.flip))

    def _leave_out(self, now: float) -> None:
        gone = [iid for iid, observed in self.instances.items() if now - observed.at >= self.gone_s]
        for iid in gone:
            del self.instances[iid]
            self.rescued.pop(iid, None)

    # ------------------------------------------------------------ the transition watcher

    def _watch(self, now: float) -> list[Action]:
        wanted = self._rescue(now) or self._relieve(now) or self._change(now)
        if wanted is None:
            return []
        self.quiet_until = now + self.settings.hold_s
        return [Send(BROKER, wanted)]

    def _rescue(self, now: float) -> FlipWanted | None:
        """Nobody is left for a role: that cannot wait, but to be asked for again it takes `stale_s`. A deployment
        that is just starting is left alone: who is there first would take both roles."""
        roles = {observed.role for observed in self.instances.values()}
        lacking = [role for role, serving in ROLES_OF.items() if roles.isdisjoint(serving)]
        if now < self.rescue_at or not any(role in self.served or now >= self.started_at for role in lacking):
            return None
        recent = {iid: observed for iid, observed in self.instances.items() if now - observed.at <= self.stale_s}
        change = rescue(self._states(now, recent or self.instances))  # who is silent may be gone as well
        if change is None:
            return None
        self.rescue_at = now + self.stale_s
        self.rescued[change.iid] = self.instances[change.iid].role
        return FlipWanted(iid=change.iid, role=change.role, why=change.why)

    def _relieve(self, now: float) -> FlipWanted | None:
        """Whoever took a second role in need gives it up when others have had that role for `hold_s`. Whoever was asked
        to, and has not by now, was not needed: it is not this watcher's business if somebody makes it mixed later."""
        if now < self.quiet_until:
            return None
        if now >= self.rescue_at + self.gone_s:
            self.rescued = {iid: own for iid, own in self.rescued.items() if self.instances[iid].role == "mixed"}
        for iid, role in self.rescued.items():
            serving, lacked = (DECODE_ROLES, "decode") if role == "prefill" else (PREFILL_ROLES, "prefill")
            others = [
                other
                for name, other in self.instances.items()
                if name not in self.rescued and other.role in serving and now - other.since >= self.settings.hold_s
            ]
            if self.instances[iid].role == "mixed" and len(others) >= max(self.settings.floor, 1):
                return FlipWanted(iid=iid, role=role, why=f"{lacked} has its own instances again")
        return None

    def _change(self, now: float) -> FlipWanted | None:
        """What the policy wants."""
        if now < self.quiet_until or not self._watching:
            return None
        change = self._flip(self._states(now, self.instances), self.settings)
        return None if change is None else FlipWanted(iid=change.iid, role=change.role, why=change.why)

    def _states(self, now: float, instances: dict[str, Observed]) -> list[InstanceState]:
        """As the policies see these. Of an instance that is silent nobody knows that it is still idle: it may be in
        the middle of a long step."""
        return [
            InstanceState(
                iid=iid,
                role=observed.role,
                idle_s=self._since(observed.idle_at, observed, now),
                low_s=self._since(observed.low_at, observed, now),
                work_s=observed.load.queued_s + observed.load.decode_s,
                queued=observed.load.queued,
                waiting=observed.load.landed,
                running=observed.load.running,
                moving=max(observed.load.waiting - observed.load.landed, 0),
                stalled=observed.load.stalled,
            )
            for iid, observed in instances.items()
        ]

    def _since(self, when: float | None, observed: Observed, now: float) -> float:
        stale = now - observed.at > self.stale_s
        return 0.0 if when is None or stale else now - when


def _share(busy: float) -> float:
    """A share of time, whatever a worker says; 0 for what is no number."""
    return min(max(0.0, busy), 1.0)
