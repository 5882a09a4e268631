"""How far prefill and decode are apart: how many of the adaptive instances keep to prefill (docs/adaptive.md).

All others decode, and prefill too where their decodes leave time. So none is a cluster of coupled instances, and as many
as the prompts need is the paper's split.
"""

from __future__ import annotations

from math import inf, sqrt

from tetri.policy.views import ClusterLoad

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of the prompts that decoding instances prefill
LONG = 2.3  # the wait that one in ten exceeds, over the mean wait, where waits are distributed exponentially
CALM = 0.8  # with a pressure below this, one arrangement is as good as another
GAIN = 0.1  # by how much another arrangement must be better


def keep(load: ClusterLoad, now: int) -> int:
    """How many instances should keep to prefill, when `now` do. The fewest with which all limits are kept with ease; if
    there is no such number, that with the least pressure, unless it is hardly better than that of now."""
    pressures = {kept: pressure(load, kept) for kept in _numbers(load.instances, now)}
    calm = [kept for kept, value in pressures.items() if value <= (CALM if kept != now else CALM + GAIN)]
    if calm:
        return min(calm)
    best = min(pressures, key=lambda kept: (pressures[kept], kept))
    return best if pressures[best] < (1 - GAIN) * pressures[now] else now


def pressure(load: ClusterLoad, kept: int) -> float:
    """How near the limits of latency are with so many instances that keep to prefill, if prompts are shared out as well
    as can be: the largest of predicted time over limit. 1: one of them is reached; infinite: the load is too high."""
    decoding = load.instances - kept
    if decoding * load.kv_tokens < load.context:
        return inf
    return min(_pressure(load, kept, decoding, share) for share in (SHARES if kept else (1.0,)))


def _pressure(load: ClusterLoad, kept: int, decoding: int, share: float) -> float:
    """The same if the decoding instances prefill this share of the prompts."""
    own = load.prefill * load.beside * share / decoding  # of their time
    left = 1.0 - own - load.tokens * load.request_s / decoding
    if left <= 0:
        return inf
    step_s = load.base_s / left  # a decode step, with its part of the chunks
    batch = load.tokens * step_s / decoding
    alone_s = load.base_s + load.request_s * batch
    found = step_s / load.tpot_s if load.tokens else 0.0
    if share > 0:
        free = 1.0 - alone_s / max(load.tpot_s, step_s)
        found = max(found, _ttft_s(load, load.beside, free, own, decoding) / load.ttft_s)
    if share < 1:
        found = max(found, _ttft_s(load, 1.0, 1.0, load.prefill * (1 - share) / kept, kept) / load.ttft_s)
    return found


def _ttft_s(load: ClusterLoad, cost: float, free: float, busy: float, instances: int) -> float:
    """The TTFT that one in ten exceeds, of prompts on instances of which prefill gets the share `free` of the time, and
    needs `busy` of it; `cost`: of a chunk there, over that on an instance of its own (Sakasegawa's formula of an
    M/G/k queue)."""
    used = busy / free if free > 0 else inf
    if used >= 1:
        return inf
    wait_s = load.mean_s * cost / free * used ** (sqrt(2 * (instances + 1)) - 1) / (instances * (1 - used))
    return load.long_s * cost / free + LONG * wait_s


def _numbers(instances: int, now: int) -> list[int]:
    """The numbers to compare: all of a few, else some in each region, and those next to the present one."""
    some, step = {0}, 1
    number = 1
    while number < instances:
        some.add(number)
        step = max(1, number // 6)
        number += step
    return sorted(some | {kept for kept in (now - 1, now, now + 1) if 0 <= kept < instances})
