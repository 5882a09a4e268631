"""What each action of a worker's core does to its engine, its KV store and the network: the one table that the live
process, the simulator and the virtual cluster of the tests share. They differ in what they hand in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tetri.core.actions import (
    Action,
    AddLeg,
    AdmitLeg,
    Adopt,
    Adopted,
    CancelLeg,
    Connect,
    Disconnect,
    Export,
    Exported,
    Forget,
    Free,
    HoldLeg,
    LegRejected,
    LengthKnown,
    Predict,
    Publish,
    Send,
    Step,
    WorkerInput,
)
from tetri.engine.base import EngineError, Leg
from tetri.kv.base import KVCorrupt, KVLost
from tetri.leg import StepDone
from tetri.wire.messages import Handle


class Core(Protocol):
    def handle(self, event: Any, now: float) -> Sequence[Action]: ...


class Legs(Protocol):
    """The part of an engine that knows no bytes. `add`, `admit` and `hold` raise EngineError."""

    def add(self, leg: Leg) -> None: ...

    def cancel(self, key: str) -> None: ...

    def admit(self, key: str, token: int) -> None: ...

    def hold(self, key: str, held: bool) -> None: ...


class KV(Protocol):
    """Moves KV between an engine and the stores. What takes time answers None, and its event comes later."""

    def export(self, action: Export) -> Exported | None: ...

    def adopt(self, action: Adopt) -> Adopted | None: ...

    def free(self, handle: Handle) -> None: ...

    def forget(self, segment: str) -> None: ...


class Network(Protocol):
    """Best effort: what cannot be sent is lost, and nothing here raises."""

    def send(self, peer: str, message: Any) -> None: ...

    def publish(self, message: Any) -> None: ...

    def connect(self, peer: str, address: str) -> None: ...

    def disconnect(self, peer: str) -> None: ...


class WorkerHands:
    """`step` runs the engine, `predict` names a length; both may answer None, and their event comes later."""

    def __init__(
        self,
        core: Core,
        clock: Callable[[], float],
        engine: Legs,
        kv: KV,
        network: Network,
        step: Callable[[int], StepDone | None],
        predict: Callable[[Predict], LengthKnown | None],
    ) -> None:
        self.core, self.clock, self.engine = core, clock, engine
        self.table: dict[type[Any], Callable[[Any], WorkerInput | None]] = {
            Send: lambda do: network.send(do.peer, do.message),
            Step: lambda do: step(do.most),
            Export: kv.export,
            Adopt: kv.adopt,
            AddLeg: self.add,
            CancelLeg: lambda do: engine.cancel(do.key),
            AdmitLeg: self.admit,
            HoldLeg: lambda do: engine.hold(do.key, do.held),
            Predict: predict,
            Publish: lambda do: network.publish(do.message),
            Free: lambda do: kv.free(do.handle),
            Forget: lambda do: kv.forget(do.segment),
            Connect: lambda do: network.connect(do.peer, do.address),
            Disconnect: lambda do: network.disconnect(do.peer),
        }

    def carry_out(self, actions: Sequence[Action]) -> None:
        """In order. What the core says to an action's result is done before the next action."""
        for action in actions:
            result = self.table[type(action)](action)
            if result is not None:
                self.carry_out(self.core.handle(result, self.clock()))

    def add(self, action: AddLeg) -> LegRejected | None:
        try:
            self.engine.add(action.leg)
        except EngineError as error:
            return LegRejected(action.leg.key, str(error))
        return None

    def admit(self, action: AdmitLeg) -> LegRejected | None:
        try:
            self.engine.admit(action.key, action.token)
        except EngineError as error:
            return LegRejected(action.key, str(error))
        return None


class Blocks(Protocol):
    """The part of an engine that copies KV bytes."""

    def export(self, key: str, start: int, stop: int, into: Sequence[memoryview]) -> None: ...

    def adopt(self, key: str, start: int, blocks: Sequence[memoryview]) -> None: ...


class Store(Protocol):
    """What of tetri.kv.base.KVStore is needed to hand KV over."""

    def put(self, count: int, write: Callable[[Sequence[memoryview]], None]) -> tuple[Handle, int | None]: ...

    def take(self, handle: Handle, digest: int | None) -> Sequence[memoryview]: ...

    def free(self, handle: Handle) -> None: ...

    def forget(self, segment: str) -> None: ...


class Copies:
    """KV by copying bytes, at once. `note` hears what went wrong: the error, the leg's key, the chunk's index."""

    def __init__(self, engine: Blocks, store: Store, note: Callable[[Exception, str, int], None]) -> None:
        self.engine, self.store, self.note = engine, store, note
        self.free, self.forget = store.free, store.forget

    def export(self, action: Export) -> Exported:
        key, start, stop = action.key, action.start, action.stop
        handle, digest = self.store.put(stop - start, lambda into: self.engine.export(key, start, stop, into))
        return Exported(key, action.index, start, stop, handle, digest)

    def adopt(self, action: Adopt) -> Adopted:
        problem = None
        try:
            blocks = self.store.take(action.handle, action.digest)
            self.engine.adopt(action.key, action.start, blocks)
        except (KVCorrupt, KVLost, EngineError) as error:
            problem = "corrupt" if isinstance(error, KVCorrupt) else "lost"
            self.note(error, action.key, action.index)
        return Adopted(action.key, action.index, problem)
