"""Snapshots that policies decide on. Nothing in them changes, nothing in them refers to live state."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PrefillView:
    """A prefill instance as the broker sees it: prompt tokens assigned to it and not yet computed."""

    iid: str
    queued_tokens: int


@dataclass(frozen=True, slots=True)
class DecodeView:
    """A decode instance as a dispatcher sees it: `free_blocks` less what the dispatcher has on offer there."""

    iid: str
    free_blocks: int


@dataclass(frozen=True, slots=True)
class QueuedPrompt:
    """A request in a prefill queue; `arrival` is its place in the order of arrival."""

    key: str
    arrival: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a prompt is: tokens [done, goal) are still to be computed."""

    key: str
    done: int
    goal: int


@dataclass(frozen=True, slots=True)
class WaitingSeat:
    """A request whose KV has landed: it holds `blocks` and wants to run."""

    key: str
    landed: int  # its place in the order of landing
    blocks: int


@dataclass(frozen=True, slots=True)
class BatchView:
    """The running batch of a decode instance. `free_blocks` may be negative: greedy admission overcommits."""

    running: int
    max_batch: int
    free_blocks: int
