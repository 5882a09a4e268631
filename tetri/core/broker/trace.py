"""What is known of how one choice is served, while the broker remembers its request."""

from __future__ import annotations

from tetri.wire.kept import Moved, ReportedEvent, Steps

MOST_STEPS, MOST_EVENTS = 4096, 512  # of one choice
# What a trace counts for: itself with the moves of each attempt, each step that may follow (a reference, and its
# share of the step), and each event.
TRACE_BYTES, STEP_BYTES, EVENT_BYTES = 2048, 16, 500


class Trace:
    """What has happened to a choice. `leads`: ids and attempts of the choices whose prefill it has shared.
    `decoded_by`: the last instance that has decoded it. `left_out`: steps and events for which there was no space."""

    __slots__ = ("decoded_by", "events", "leads", "left_out", "moves", "reserved", "steps")

    def __init__(self, reserved: int) -> None:
        """`reserved`: bytes that it counts for."""
        self.reserved = reserved
        self.moves: list[Moved] = []
        self.events: list[ReportedEvent] = []
        self.steps: Steps = []
        self.leads: tuple[tuple[str, int], ...] = ()
        self.decoded_by: str | None = None
        self.left_out = 0
