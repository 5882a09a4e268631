"""The action executor of a worker: carries out the core's actions on the engine, the KV store and the network. The live
process and the simulator, with faults or without, share it, with different engines, stores and networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from tetri.core.actions import (
    Action,
    AddRequest,
    AdmitRequest,
    Adopt,
    Adopted,
    CancelRequest,
    Connect,
    Disconnect,
    Export,
    Exported,
    Free,
    Freed,
    HoldRequest,
    LengthKnown,
    Predict,
    Publish,
    RequestRejected,
    Send,
    StayRequest,
    Step,
    WorkerInput,
)
from tetri.engine.base import EngineError, EngineRequest
from tetri.engine_request import StepDone
from tetri.instance import Reach
from tetri.kv.base import Block, Fetched, KVCorrupt, KVError, KVForeign, KVShort, KVStore, Wanted
from tetri.wire.handover import Handle


class Handler(Protocol):
    """The part of a worker's core that the executor uses."""

    def handle(self, event: Any, now: float) -> Sequence[Action]:
        """Handle an event at time `now`, in seconds, and return the actions to carry out."""


class RequestEngine(Protocol):
    """The part of an engine that schedules requests. All but `cancel` raise EngineError."""

    def add(self, request: EngineRequest) -> None: ...

    def cancel(self, key: str) -> None: ...

    def admit(self, key: str, token: int, further: Sequence[int] = ()) -> None: ...

    def hold(self, key: str, held: bool) -> None: ...

    def stay(self, key: str, decode_key: str) -> None: ...


class KV(Protocol):
    """Moves KV between an engine and the stores. A method returns None when its event follows later."""

    def export(self, action: Export) -> Exported | None: ...

    def adopt(self, action: Adopt) -> Adopted | None: ...

    def free(self, handle: Handle) -> Freed | None: ...

    def meet(self, peer: str, reach: Reach) -> None: ...

    def part(self, peer: str) -> None: ...


class Network(Protocol):
    """Connections to peers. Best effort: a message that cannot be sent is lost, and no method raises."""

    def send(self, peer: str, message: Any) -> None:
        """Send a message to a connected peer."""

    def publish(self, message: Any) -> None:
        """Send a message to all subscribers."""

    def connect(self, peer: str, address: str) -> None:
        """Connect to the inbox of a peer."""

    def disconnect(self, peer: str) -> None:
        """Close the connection to a peer."""


class WorkerExecutor:
    """Carries out the actions of a worker's core.

    step      runs the engine for up to so many steps, with a chunk of up to so many tokens; None when the event
              follows later
    predict   predicts a length; None when the event follows later
    known     the lengths that became known while the engine computed. The core receives them before StepDone, because a
              prompt stops waiting for its length when its last chunk is computed
    """

    def __init__(
        self,
        core: Handler,
        clock: Callable[[], float],
        engine: RequestEngine,
        kv: KV,
        network: Network,
        step: Callable[[int, int | None], StepDone | None],
        predict: Callable[[Predict], LengthKnown | None],
        known: Callable[[], Iterator[LengthKnown]] | None = None,
    ) -> None:
        self.core, self.clock, self.step, self.known = core, clock, step, known
        self.table: dict[type[Any], Callable[[Any], WorkerInput | None]] = {
            Send: lambda do: network.send(do.peer, do.message),
            Step: self._step,
            Export: kv.export,
            Adopt: kv.adopt,
            AddRequest: lambda do: self._try(do.request.key, engine.add, do.request),
            CancelRequest: lambda do: engine.cancel(do.key),
            AdmitRequest: lambda do: self._try(do.key, engine.admit, do.key, do.token, do.further),
            HoldRequest: lambda do: engine.hold(do.key, do.held),
            StayRequest: lambda do: self._try(do.key, engine.stay, do.key, do.decode_key),
            Predict: predict,
            Publish: lambda do: network.publish(do.message),
            Free: lambda do: kv.free(do.handle),
            Connect: lambda do: self.meet(network, kv, do),
            Disconnect: lambda do: self.part(network, kv, do),
        }

    def carry_out(self, actions: Sequence[Action]) -> None:
        """Carry out actions in order. Their results go to the core after the last one, or just before a step: what a
        result causes may be about a request that a later action adds."""
        table = self.table
        results: list[Any] = []
        for action in actions:
            if results and type(action) is Step:
                self._handle(results)
            result = table[type(action)](action)
            if result is not None:
                results.append(result)
        if results:
            self._handle(results)

    def _step(self, action: Step) -> StepDone | None:
        done = self.step(action.most, action.chunk)
        if self.known is not None:
            self._handle([*self.known()])
        return done

    def _handle(self, results: list[Any]) -> None:
        while results:
            self.carry_out(self.core.handle(results.pop(0), self.clock()))

    @staticmethod
    def meet(network: Network, kv: KV, action: Connect) -> None:
        """Connect to a peer, and prepare to read its KV."""
        network.connect(action.peer, action.address)
        if action.reach is not None:
            kv.meet(action.peer, action.reach)

    @staticmethod
    def part(network: Network, kv: KV, action: Disconnect) -> None:
        """Disconnect from a peer, and stop reading its KV."""
        network.disconnect(action.peer)
        kv.part(action.peer)

    @staticmethod
    def _try(key: str, call: Callable[..., None], *arguments: Any) -> RequestRejected | None:
        """Call a method of the engine about a request, or return why the engine rejects the request."""
        try:
            call(*arguments)
        except EngineError as error:
            return RequestRejected(key, str(error))
        return None


class Blocks(Protocol):
    """The part of an engine that copies KV bytes."""

    def export(self, key: str, start: int, stop: int, into: Sequence[Block]) -> None: ...

    def adopt(self, key: str, start: int, blocks: Sequence[Block]) -> None: ...


class Copies:
    """Copies KV between an engine and a KV store. `events` reports fetches that take time and slots that become free
    later. `note(error, key, index)` is called for each failed fetch."""

    PROBLEMS = ((KVShort, "truncated"), (KVCorrupt, "flipped"), (KVForeign, "foreign"))  # any other error: "lost"

    def __init__(self, engine: Blocks, store: KVStore, note: Callable[[Exception, str, int], None]) -> None:
        self.engine, self.store, self.note = engine, store, note
        self.meet, self.part, self.due = store.meet, store.part, store.due
        self._awaited: dict[tuple[str, int], Adopt] = {}  # by ticket

    def export(self, action: Export) -> Exported:
        key, start, stop = action.key, action.start, action.stop

        def write(into: Sequence[Block]) -> None:
            self.engine.export(key, start, stop, into)

        handle, digest = self.store.put(stop - start, write, key)
        return Exported(key, action.index, start, stop, handle, digest)

    def free(self, handle: Handle) -> Freed | None:
        self.store.free(handle)
        return self._freed()

    def _freed(self) -> Freed | None:
        slots = self.store.freed()
        return Freed(slots) if slots else None

    def adopt(self, action: Adopt) -> Adopted | None:
        ticket = (action.key, action.index)
        self._awaited[ticket] = action
        fetched = self.store.fetch(Wanted(ticket, action.peer, action.path, action.handle, action.digest))
        return None if fetched is None else self._adopted(fetched)

    def _adopted(self, fetched: Fetched) -> Adopted:
        key, index = fetched.ticket
        action = self._awaited.pop(fetched.ticket)
        count = len(action.handle.slots)
        try:
            if fetched.problem is not None:
                raise fetched.problem
            if len(fetched.blocks) != count:
                raise KVShort(f"{len(fetched.blocks)} of {count} blocks have come")
            missed = self._write(action, fetched.blocks)
        except (KVError, EngineError) as error:
            self.note(error, key, index)
            return Adopted(key, index, next((name for kind, name in self.PROBLEMS if isinstance(error, kind)), "lost"))
        return Adopted(key, index, None, missed)

    def _write(self, action: Adopt, blocks: Sequence[Block]) -> tuple[str, ...]:
        """Copy blocks into each engine request of the action; return those that have ended meanwhile. Raises
        EngineError if all have."""
        missed: dict[str, EngineError] = {}
        for key in action.keys:
            try:
                self.engine.adopt(key, action.start, blocks)
            except EngineError as error:
                missed[key] = error
        if len(missed) == len(action.keys):
            raise missed[action.keys[-1]]
        return tuple(missed)

    def events(self) -> Iterator[Adopted | Freed]:
        """Yield the fetches that have ended and the slots that were freed since the last call."""
        for fetched in self.store.fetched():
            if fetched.ticket in self._awaited:
                yield self._adopted(fetched)
            else:  # not for the core: it may await another chunk with this key
                self.note(KVError("nobody waits for this chunk: it has come twice"), *fetched.ticket)
        freed = self._freed()
        if freed is not None:
            yield freed
