"""Chooses the scenes that measure an engine, by the engine's capacity.

A chunk that starts deep in a prompt requires running the chunks before it, and the engine makes those as long as its
token budget. So the starts are multiples of the budget, and only the last chunk of a prompt has a free size.
"""

from __future__ import annotations

from dataclasses import dataclass

from tetri.instance import Capacity
from tetri.request import blocks_for

DEEP = 4096  # tokens: the longest context that is measured
STEPS = 6  # measured decode steps of a scene, after one that is not measured
MARGIN = STEPS + 4  # most tokens by which a request grows while it is measured
FINE_FROM = 64  # smaller chunk sizes are powers of two only: there the rate is far from its peak


@dataclass(frozen=True, slots=True)
class Scene:
    """A set of requests to run together. `contexts`: tokens of each decode request; `prompts`: tokens of each prompt to
    prefill beside them. `held_out`: for testing the fit; the fit does not use steps that only such scenes have."""

    prompts: tuple[int, ...] = ()
    contexts: tuple[int, ...] = ()
    held_out: bool = False


def scenes(capacity: Capacity, quick: bool = False) -> list[Scene]:
    """All scenes that fit into `capacity`; with fewer sizes when `quick`."""
    chunk = min(capacity.chunk_tokens, longest_prompt(capacity))
    lengths = (32, 512) if quick else (32, 512, 2048)
    wanted = [Scene((size,)) for size in sizes(chunk, quick)]
    wanted += [Scene((length,)) for length in _long_prompts(capacity, chunk, quick)]
    wanted += [Scene((), (length,) * batch) for batch in batches(capacity, quick) for length in lengths]
    wanted.append(Scene((), (max(min(DEEP, capacity.context - MARGIN), 1),)))
    wanted += _held_out(capacity, chunk, quick)
    return list(dict.fromkeys(scene for scene in wanted if _fits(scene, capacity)))


def brief(capacity: Capacity) -> list[Scene]:
    """The scenes of the quick fit, without those held out."""
    return [scene for scene in scenes(capacity, quick=True) if not scene.held_out]


def longest_prompt(capacity: Capacity) -> int:
    """Tokens of the longest prompt that the engine can prefill."""
    return min(capacity.context - 1, capacity.blocks * capacity.block_tokens)


def sizes(chunk: int, quick: bool = False) -> list[int]:
    """Chunk sizes in tokens up to the budget `chunk`: powers of two, and from FINE_FROM on three between each two."""
    found = {chunk}
    size = 1
    while size <= chunk:
        found.add(size)
        if not quick and size >= FINE_FROM:
            found.update(size * part // 4 for part in (5, 6, 7))
        size *= 4 if quick and size < FINE_FROM else 2
    return sorted(size for size in found if size <= chunk)


def batches(capacity: Capacity, quick: bool = False) -> list[int]:
    """Decode batch sizes: powers of two (of four when `quick`), and the largest."""
    largest = min(capacity.max_batch, capacity.chunk_tokens)
    found = {largest}
    batch = 1
    while batch < largest:
        found.add(batch)
        batch *= 4 if quick else 2
    return sorted(found)


def _long_prompts(capacity: Capacity, chunk: int, quick: bool) -> list[int]:
    """Lengths of prompts of several chunks; the size of the last chunk is also measured at the start of a prompt."""
    whole = min(longest_prompt(capacity) // chunk, 3 if quick else 4)
    found = [whole * chunk] if whole > 1 else []
    known = sizes(chunk, quick)
    quarter, half = (max((size for size in known if size <= chunk // part), default=1) for part in (4, 2))
    found += [chunk + quarter, 2 * chunk + half, 3 * chunk + quarter][: 1 if quick else 3]
    return [length for length in found if length <= longest_prompt(capacity)]


def _held_out(capacity: Capacity, chunk: int, quick: bool) -> list[Scene]:
    """Scenes with sizes, starts, batches and contexts between those of the fit, and with combinations that the fit does
    not have: several prompts in a chunk, contexts of unequal length, prefill beside decode."""
    small = [3 << shift for shift in range(1, 5, 2 if quick else 1)]
    large = [FINE_FROM * 11 // 8 << shift for shift in range(0, 14, 2 if quick else 1)]
    prompts: list[tuple[int, ...]] = [(size,) for size in (*small, *large) if size < chunk]
    prompts += [(chunk + chunk * 3 // 8,), (chunk // 4,) * 4, (chunk // 8, chunk // 2)]
    largest = min(capacity.max_batch, capacity.chunk_tokens)
    middle = [3 << shift for shift in range(0, 14, 2 if quick else 1) if 3 << shift < largest]
    lengths = (200,) if quick else (200, 1000)
    contexts: list[tuple[int, ...]] = [(length,) * batch for batch in middle for length in lengths]
    contexts += [(40, 900) * (largest // 4)]
    beside = [min(batch, largest, chunk // 2) for batch in (4, 16)]
    length = min(256, max(capacity.context // 4, 1))
    mixed = [Scene((size - batch,), (length,) * batch, True) for batch in beside for size in (chunk // 4, chunk)]
    return [
        *(Scene(several, (), True) for several in prompts if min(several) > 0),
        *(Scene((), several, True) for several in contexts if several),
        *(scene for scene in mixed if scene.contexts and min(scene.prompts) > 0),
    ]


def _fits(scene: Scene, capacity: Capacity) -> bool:
    """Whether all requests of the scene fit the context, and the blocks suffice without waiting or preemption."""
    grown = [length + MARGIN for length in scene.contexts]
    blocks = sum(blocks_for(length, capacity.block_tokens) for length in (*scene.prompts, *grown))
    longest = max([*(length + 1 for length in scene.prompts), *grown])
    return longest <= capacity.context and blocks <= capacity.blocks
