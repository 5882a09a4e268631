"""Timelines in little memory: encoded, with the steps by themselves. Choices of one batch share the bytes of a step,
and those of one choice can be joined as they are."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from msgspec import Struct

from tetri.wire.observation import StepSpan, Timeline

_encoder = msgspec.msgpack.Encoder()
_timelines = msgspec.msgpack.Decoder(Timeline)
_steps = msgspec.msgpack.Decoder(list[StepSpan])
ARRAY32 = b"\xdd"  # a MessagePack array whose length follows in four bytes


class KeptTimeline(Struct, frozen=True, gc=False):
    """A Timeline of which the `age_s` and the starts of its steps depend on the time of the answer."""

    timeline: bytes
    steps: bytes
    count: int  # of steps

    @property
    def size(self) -> int:
        """Bytes of both."""
        return len(self.timeline) + len(self.steps)


def pack_step(step: StepSpan) -> bytes:
    """A step in bytes. `start_s` is on the clock of whoever keeps it."""
    return _encoder.encode(step)


def pack(timeline: Timeline, steps: Iterable[bytes], count: int) -> KeptTimeline:
    """A timeline without steps, and these steps of `pack_step`."""
    return KeptTimeline(_encoder.encode(timeline), b"".join(steps), count)


def unpack(kept: KeptTimeline, arrival: float, now: float) -> Timeline:
    """The timeline at `now`. The arrival of its request is on the clock of its steps."""
    timeline = _timelines.decode(kept.timeline)
    return timeline.changed(age_s=now - arrival, steps=unpack_steps([kept.steps], kept.count, arrival))


def unpack_steps(steps: Iterable[bytes], count: int, arrival: float) -> list[StepSpan]:
    """The steps, from the arrival on."""
    found = _steps.decode(b"".join([ARRAY32, count.to_bytes(4), *steps]))
    return [
        StepSpan(
            each.start_s - arrival, each.seconds, each.iid, each.tokens, each.batch, each.chunk_tokens, each.passes
        )
        for each in found
    ]
