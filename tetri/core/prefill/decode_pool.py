"""Load of the decode instances: the newest reports, corrected by the dispatcher's own reservations since then."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf
from random import Random

from tetri.core.instance.identity import Identity
from tetri.core.instance.peers import Peers
from tetri.core.prefill.home import Home
from tetri.core.prefill.request import PrefillRequest
from tetri.instance import Instance
from tetri.policy.dispatch import least_deferred
from tetri.policy.rules import DECODE_ROUTES
from tetri.policy.views import EXCLUDED, DecodePool, Need
from tetri.wire.load import Load


@dataclass(slots=True)
class Reservation:
    """Load that one offer adds to an instance, until a load report includes it. `answered_at`: when it was granted or
    deferred, infinite before that."""

    iid: str
    need: Need
    answered_at: float = inf


class LivePool:
    """The loads that the dispatch policy reads, one column per decode instance.

    `refresh` rebuilds `columns` after a new Membership or ClusterView; reservations update them in between. The paper
    does not say how loads are corrected between two broadcasts. Here, an offer counts as a reservation until a report
    arrives that was made after its answer: that report counts the offer as granted or deferred.

    `home` is the decode phase of this instance, whose load is never stale."""

    def __init__(self, own: Identity, peers: Peers) -> None:
        self.own, self.peers = own, peers
        self.home: Home | None = None
        self.columns = DecodePool()
        self.reservations: dict[int, Reservation] = {}  # by offer number
        self.unread: dict[str, int] = {}  # instances that report failed transfers in a row, and how many
        self._version = self._member_version = -1  # of `peers`, when the columns were built
        self._instances: list[Instance] = []
        self._column: dict[str, int] = {}  # iid -> column
        self._smallest_blocks = self._smallest_context = 0  # smallest capacity of the other instances
        self._home_column: int | None = None

    def refresh(self) -> None:
        """Update the columns from the newest membership, reports and own load."""
        load = None if self.home is None or self.peers.prefills_only() else self.home.load()
        if self._version != self.peers.version or (load is None) != (self._home_column is None):
            self._build(load)
        elif load is not None and self._home_column is not None:
            self._set_load(self._home_column, load)

    def fits(self, request: PrefillRequest) -> bool:
        """Return whether any instance is large enough for the request, whatever its load."""
        return len(self._too_small(request)) < len(self.columns.iids)

    def fitting(self, request: PrefillRequest) -> list[str]:
        """Return the instances that are large enough for the request, whatever their load."""
        too_small = dict.fromkeys(self._too_small(request))
        return [iid for column, iid in enumerate(self.columns.iids) if column not in too_small]

    def has_memory(self, blocks: int) -> bool:
        """Return whether any instance has so many free blocks. Under overload none has, and this is cheaper than to ask
        the policy."""
        return max(self.columns.free, default=EXCLUDED) >= blocks

    def choose(self, request: PrefillRequest, need: Need, refused: Iterable[str], rng: Random) -> str | None:
        """Return the instance that the dispatch policy chooses, or None. Instances that are too small, and those in
        `refused`, are excluded."""
        at_home = request.may_stay and self._home_column is not None
        if not (at_home or self.has_memory(need.blocks)):
            return None
        route = DECODE_ROUTES[self.own.rules.decode_route]
        return self._chosen(request, refused, lambda: route(need, self.columns, rng))

    def choose_later(self, request: PrefillRequest, refused: Iterable[str], rng: Random) -> str | None:
        """Return the instance that is expected to have memory first, when none has it now; None if all have deferred
        as much as they may."""
        return self._chosen(request, refused, lambda: least_deferred(self.columns, rng))

    def _chosen(self, request: PrefillRequest, refused: Iterable[str], route: Callable[[], int | None]) -> str | None:
        """Return the instance that `route` chooses. A request that could stay has its blocks here already."""
        home = self._home_column if request.may_stay else None
        if home is not None:
            self._add_blocks(home, request.flow.blocks)
        chosen = self._chosen_without(request, refused, route)
        if home is not None:
            self._add_blocks(home, -request.flow.blocks)
        return chosen

    def _add_blocks(self, column: int, blocks: int) -> None:
        self.columns.free[column] += blocks
        self.columns.spare[column] += blocks

    def _chosen_without(
        self, request: PrefillRequest, refused: Iterable[str], route: Callable[[], int | None]
    ) -> str | None:
        excluded = dict.fromkeys(self._too_small(request))
        excluded.update((self._column[iid], None) for iid in refused if iid in self._column)
        pool, free = self.columns, self.columns.free
        saved = [free[column] for column in excluded]
        for column in excluded:
            free[column] = EXCLUDED
        chosen = route()
        for column, blocks in zip(excluded, saved, strict=True):
            free[column] = blocks
        if chosen is None:
            return None
        pool.last = chosen
        return pool.iids[chosen]

    # ------------------------------------------------------------ own offers

    def reserve(self, number: int, iid: str, need: Need) -> None:
        """Count the load of offer `number`. The own instance needs no reservation: its load is read directly."""
        self._add_load(iid, need, 1)
        if iid != self.own.iid:
            self.reservations[number] = Reservation(iid, need)

    def answered(self, number: int, now: float) -> None:
        """Record when offer `number` was granted or deferred. Later reports of the instance include it."""
        reservation = self.reservations.get(number)
        if reservation is not None:
            reservation.answered_at = min(reservation.answered_at, now)

    def deferred(self, number: int, now: float) -> None:
        """As `answered`. Until the next report, assume that nothing is free there beyond what is deferred."""
        self.answered(number, now)
        reservation = self.reservations.get(number)
        if reservation is not None and reservation.iid in self._column:
            self._at_most(reservation.iid, -1)

    def withdrawn(self, number: int) -> Reservation | None:
        """Remove the reservation of offer `number`, and return it; None if a load report includes it."""
        reservation = self.reservations.pop(number, None)
        if reservation is not None:
            self._add_load(reservation.iid, reservation.need, -1)
        return reservation

    def refused(self, number: int) -> None:
        """Remove the reservation. Until the next report, assume fewer free blocks there than the offer needed."""
        reservation = self.withdrawn(number)
        if reservation is not None and reservation.iid in self._column:
            self._at_most(reservation.iid, reservation.need.blocks - 1)

    def _at_most(self, iid: str, blocks: int) -> None:
        column = self._column[iid]
        self.columns.free[column] = min(self.columns.free[column], blocks)
        self.columns.spare[column] = min(self.columns.spare[column], blocks)

    # ------------------------------------------------------------ the columns

    def _build(self, home: Load | None) -> None:
        self._version = self.peers.version
        if self._member_version != self.peers.member_version or (home is None) != (self._home_column is None):
            self._replace_columns(home is not None)
        reports, pool = self.peers.loads(), self.columns
        loads: list[Load] = []
        self.unread = {}
        for instance in self._instances:
            iid = instance.iid
            report = reports.get(iid)
            if report is None or report.incarnation != instance.incarnation:
                reports.pop(iid, None)
                loads.append(Load(free_blocks=instance.capacity.blocks))  # assume it is empty; a Refuse corrects that
                continue
            load = report.load
            loads.append(load)
            if load.unread:
                self.unread[iid] = load.unread
        if home is not None:
            loads.append(home)
        pool.free = [load.free_blocks - load.kept_blocks - load.deferred_blocks for load in loads]
        pool.spare = [left - load.growth_blocks for left, load in zip(pool.free, loads, strict=True)]
        pool.heavy = [load.heavy for load in loads]
        pool.light = [load.waiting + load.running - load.heavy for load in loads]
        pool.step_s = [load.step_s for load in loads]
        for number, reservation in list(self.reservations.items()):
            report = reports.get(reservation.iid)
            made_at = inf if report is None else self.peers.seen_at - report.age_s
            if reservation.answered_at < made_at:
                del self.reservations[number]  # the report includes it
            else:
                self._add_load(reservation.iid, reservation.need, 1)

    def _replace_columns(self, decodes_here: bool) -> None:
        """Replace the columns after the set of decode instances has changed."""
        last = self.columns.iids[self.columns.last] if self.columns.last >= 0 else ""
        self._member_version = self.peers.member_version
        self._instances = self.peers.decoders()
        self._home_column = len(self._instances) if decodes_here else None
        adapts = self.home is not None and self.home.adapts()
        self.columns.home = self._home_column if adapts and self._home_column is not None else -1
        iids = [instance.iid for instance in self._instances] + [self.own.iid] * decodes_here
        self._column = {iid: column for column, iid in enumerate(iids)}
        self._smallest_blocks = min((instance.capacity.blocks for instance in self._instances), default=0)
        self._smallest_context = min((instance.capacity.context for instance in self._instances), default=0)
        sizes = [instance.capacity.blocks for instance in self._instances]
        self.columns.iids, self.columns.last = iids, self._column.get(last, -1)
        self.columns.most = sizes + [self.own.capacity.blocks] * decodes_here

    def _set_load(self, column: int, load: Load) -> None:
        pool = self.columns
        pool.free[column] = load.free_blocks - load.kept_blocks - load.deferred_blocks
        pool.spare[column] = pool.free[column] - load.growth_blocks
        pool.heavy[column] = load.heavy
        pool.light[column] = load.waiting + load.running - load.heavy
        pool.step_s[column] = load.step_s

    def _add_load(self, iid: str, need: Need, sign: int) -> None:
        column, pool = self._column.get(iid), self.columns
        if column is None:
            return
        pool.free[column] -= sign * need.blocks
        pool.spare[column] -= sign * need.end_blocks
        (pool.heavy if need.heavy else pool.light)[column] += sign * need.choices

    def _too_small(self, request: PrefillRequest) -> list[int]:
        """Return the columns of the instances that are too small for the request."""
        blocks = request.least(self.own.capacity.block_tokens)
        too_small: list[int] = []
        if blocks > self._smallest_blocks or request.goal >= self._smallest_context:
            too_small = [column for column, each in enumerate(self._instances) if not request.fits(each.capacity)]
        if self._home_column is not None and not self._fits_here(request):
            too_small.append(self._home_column)
        return too_small

    def _fits_here(self, request: PrefillRequest) -> bool:
        """Return whether this instance can decode the request too. Unless the request stays, its prefill keeps its
        blocks until all KV is in the slab."""
        own, blocks = self.own, request.flow.blocks
        if request.may_stay:
            return request.fits(own.capacity)
        copies = 1 + len(request.open())
        return request.fits(own.capacity) and (copies * blocks <= own.capacity.blocks or blocks <= own.open_slots)
