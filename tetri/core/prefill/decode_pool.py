"""The decode instances as one dispatcher sees them: their last reports, and what it has asked of them since."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random

from tetri.core.instance.identity import Identity
from tetri.core.instance.peers import Peers
from tetri.core.prefill.request import PrefillRequest
from tetri.instance import Instance
from tetri.policy.rules import DECODE_ROUTES
from tetri.policy.views import DecodePool, Need
from tetri.request import blocks_for
from tetri.wire.messages import Load


@dataclass(slots=True)
class Reservation:
    """What one offer takes of an instance, as long as no report can contain it."""

    iid: str
    need: Need
    granted_at: float | None = None


class LivePool:
    """`columns` are built when they are first wanted after a new roster or view, and kept up to date from then on. The
    paper does not say how stale loads are corrected between broadcasts: here by the dispatcher's own offers. An offer
    counts until a report is seen that was made after its Grant came: the decode side had reserved its blocks by then.

    `home` returns this instance's own load while it decodes too, else None. That load is never stale."""

    def __init__(self, own: Identity, peers: Peers) -> None:
        self.own, self.peers = own, peers
        self.home: Callable[[], Load | None] = lambda: None
        self.columns = DecodePool()
        self.reservations: dict[int, Reservation] = {}  # by the offer's number
        self._version = self._member_version = -1  # of the neighbours, as of the columns
        self._known: list[Instance] = []
        self._place: dict[str, int] = {}  # iid -> column
        self._least_blocks = self._least_context = 0  # of all columns but the own one
        self._home_column: int | None = None

    def refresh(self) -> None:
        """Bring the columns up to date."""
        load = self.home()
        if self._version != self.peers.version or (load is None) != (self._home_column is None):
            self._build(load)
        elif load is not None and self._home_column is not None:
            self._report(self._home_column, load)

    def fits(self, request: PrefillRequest) -> bool:
        """Whether any instance could ever hold it."""
        return len(self._unfit(request)) < len(self.columns.iids)

    def choose(self, request: PrefillRequest, need: Need, refused: Iterable[str], rng: Random) -> str | None:
        """Where the policy lets it go; never to one that cannot hold it or has just refused it."""
        out = dict.fromkeys(self._unfit(request))
        out.update((self._place[iid], None) for iid in refused if iid in self._place)
        pool, free = self.columns, self.columns.free
        kept = [free[column] for column in out]
        for column in out:
            free[column] = -1
        chosen = DECODE_ROUTES[self.own.rules.decode_route](need, pool, rng)
        for column, blocks in zip(out, kept, strict=True):
            free[column] = blocks
        if chosen is None:
            return None
        pool.last = chosen
        return pool.iids[chosen]

    # ------------------------------------------------------------ own offers

    def reserve(self, number: int, iid: str, need: Need) -> None:
        """Offer `number` asks this of an instance."""
        self._count(iid, need, 1)
        if iid != self.own.iid:
            self.reservations[number] = Reservation(iid, need)

    def granted(self, number: int, now: float) -> None:
        reservation = self.reservations.get(number)
        if reservation is not None and reservation.granted_at is None:
            reservation.granted_at = now

    def withdrawn(self, number: int) -> None:
        reservation = self.reservations.pop(number, None)
        if reservation is not None:
            self._count(reservation.iid, reservation.need, -1)

    def refused(self, number: int) -> None:
        """What has no room for this has none for as much again, until the next report says so."""
        reservation = self.reservations.pop(number, None)
        if reservation is not None:
            self._count(reservation.iid, reservation.need, -1)
            column = self._place.get(reservation.iid)
            if column is not None:
                most = reservation.need.blocks - 1
                self.columns.free[column] = min(self.columns.free[column], most)
                self.columns.spare[column] = min(self.columns.spare[column], most)

    # ------------------------------------------------------------ the columns

    def _build(self, home: Load | None) -> None:
        self._version = self.peers.version
        if self._member_version != self.peers.member_version or (home is None) != (self._home_column is None):
            self._enter_all(home is not None)
        reports = self.peers.loads()
        made_at: dict[str, float] = {}
        loads: list[Load] = []
        for instance in self._known:
            report = reports.get(instance.iid)
            if report is None or report.incarnation != instance.incarnation:
                loads.append(Load(free_blocks=instance.capacity.blocks))  # as if empty: its Refuse corrects that
            else:
                loads.append(report.load)
                made_at[instance.iid] = self.peers.seen_at - report.age_s
        if home is not None:
            loads.append(home)
        pool = self.columns
        pool.free = [load.free_blocks for load in loads]
        pool.spare = [load.free_blocks - load.growth_blocks for load in loads]
        pool.heavy = [load.heavy for load in loads]
        pool.light = [load.waiting + load.running - load.heavy for load in loads]
        for number, reservation in list(self.reservations.items()):
            if reservation.granted_at is not None and reservation.granted_at < made_at.get(
                reservation.iid, float("inf")
            ):
                del self.reservations[number]  # the report has it; of who never reports nothing is known anyway
            else:
                self._count(reservation.iid, reservation.need, 1)

    def _enter_all(self, at_home: bool) -> None:
        """Others are there than before."""
        last = self.columns.iids[self.columns.last] if self.columns.last >= 0 else ""
        self._member_version = self.peers.member_version
        self._known = self.peers.decoders()
        self._home_column = len(self._known) if at_home else None
        iids = [instance.iid for instance in self._known] + [self.own.iid] * at_home
        self._place = {iid: column for column, iid in enumerate(iids)}
        self._least_blocks = min((instance.capacity.blocks for instance in self._known), default=0)
        self._least_context = min((instance.capacity.context for instance in self._known), default=0)
        self.columns.iids, self.columns.last = iids, self._place.get(last, -1)

    def _report(self, column: int, load: Load) -> None:
        pool = self.columns
        pool.free[column] = load.free_blocks
        pool.spare[column] = load.free_blocks - load.growth_blocks
        pool.heavy[column] = load.heavy
        pool.light[column] = load.waiting + load.running - load.heavy

    def _count(self, iid: str, need: Need, sign: int) -> None:
        column, pool = self._place.get(iid), self.columns
        if column is None:
            return
        pool.free[column] -= sign * need.blocks
        pool.spare[column] -= sign * need.end_blocks
        (pool.heavy if need.heavy else pool.light)[column] += sign

    def _unfit(self, request: PrefillRequest) -> list[int]:
        """The columns of instances that can never hold it."""
        blocks = blocks_for(len(request.prompt) + request.sampling.max_tokens, self.own.capacity.block_tokens)
        unfit: list[int] = []
        if blocks > self._least_blocks or request.goal >= self._least_context:
            unfit = [column for column, instance in enumerate(self._known) if not request.fits(instance.capacity)]
        if self._home_column is not None and not self._fits_at_home(request):
            unfit.append(self._home_column)
        return unfit

    def _fits_at_home(self, request: PrefillRequest) -> bool:
        """Here its prefill has its blocks too, until all KV is in the store."""
        own, blocks = self.own, request.flow.blocks
        return request.fits(own.capacity) and (2 * blocks <= own.capacity.blocks or blocks <= own.open_slots)
