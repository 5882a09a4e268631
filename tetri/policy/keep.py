"""How far prefill and decode are apart: how many of the adaptive instances keep to prefill (docs/adaptive.md).

All others decode, and prefill too where their decodes leave time. So none is a cluster of coupled instances, and as
many as the prompts need is the paper's split.
"""

from __future__ import annotations

from math import hypot, inf, sqrt

from tetri.policy.views import ClusterLoad

SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)  # of the prompts that decoding instances prefill
WORST = 4.0  # time between tokens over its limit that is looked at: decodes give way as far if prompts need it
LATE = 1.28  # of ten requests one meets a load that is so many standard deviations above its mean
VARIED = 1.5  # 1 + the squared coefficient of variation of the prefill of a prompt
CALM = 0.6  # below this pressure one arrangement is as good as another
GAIN = 0.1  # by how much another arrangement must be better


def keep(load: ClusterLoad, now: int) -> int:
    """How many instances should keep to prefill, when `now` do: none while all limits are kept with ease or where that
    is hardly better, else the number with the least pressure, unless it is hardly better than that of now. A load that
    is too high for any number changes nothing."""
    none = pressure(load, 0)
    if none <= (CALM if now else CALM + GAIN):
        return 0
    best, least = 0, (1 - (GAIN / 2 if now else GAIN)) * none
    for kept in _numbers(load.instances, now):
        found = pressure(load, kept, least) if kept else none
        if found < least:
            best, least = kept, found
    if not best:
        return now if none == inf else 0
    return best if not now or least < (1 - GAIN) * pressure(load, now) else now


def pressure(load: ClusterLoad, kept: int, least: float = inf) -> float:
    """How near the limits of latency are with so many instances that keep to prefill, if prompts are shared out as well
    as can be: the largest of predicted time over limit. Above 1 a limit is missed; infinite: the load is too high. One
    that is not below `least` is told as that."""
    decoding = load.instances - kept
    if load.context > decoding * load.kv_tokens:
        return inf
    for share in SHARES if kept else (1.0,):
        least = min(_shared(load, kept, decoding, share, least), least)
    return least


def _shared(load: ClusterLoad, kept: int, decoding: int, share: float, least: float) -> float:
    """The pressure if the decoding instances prefill this share of the prompts. One that is not below `least` is told
    as that or as any other such number."""
    tokens = load.requests * load.output / decoding  # a second, of each
    own = load.prefill * load.beside * share / decoding  # of its time
    left = 1.0 - own - tokens * load.request_s
    alone = _ttft_s(load, 1.0, load.prefill * (1 - share) / kept, kept) / load.ttft_s if share < 1 else 0.0
    if left <= 0 or alone >= least:
        return least
    step_s = load.base_s / left  # a decode step, with its part of the chunks
    decodes = tokens * step_s
    prompts = load.requests * share / decoding * load.output * step_s  # that arrive while a request decodes
    varied = own * sqrt(VARIED / prompts) if share else 0.0
    step_s *= 1.0 + LATE / left * hypot(varied, tokens * load.request_s / sqrt(max(decodes, 1.0)))
    if share == 0 or step_s / load.tpot_s >= least:
        return max(alone, step_s / load.tpot_s)
    decode_s = load.base_s + load.request_s * decodes  # without it

    def beside(pace: float) -> float:
        """The TTFT over its limit if decodes may wait `pace` times their limit for each token."""
        free = (1.0 - decode_s / (pace * load.tpot_s)) / load.beside
        return _ttft_s(load, free, own / load.beside / free, decoding) / load.ttft_s if free > 0 else inf

    low = max(step_s / load.tpot_s, 1.0)
    if beside(low) <= 1 or low >= WORST:
        return max(alone, step_s / load.tpot_s, beside(low) if low < WORST else 0.0)
    if low >= least:
        return low
    high = WORST
    for _ in range(8):  # the least pace at which the prompts are in time
        middle = (low + high) / 2
        low, high = (middle, high) if beside(middle) > 1 else (low, middle)
    return max(alone, high)


def _ttft_s(load: ClusterLoad, free: float, used: float, instances: int) -> float:
    """The TTFT of a long prompt after the mean wait, on instances where prefill runs at `free` times its speed on an
    instance of its own, and is busy for the share `used` of the time (Sakasegawa's formula for the M/G/k queue)."""
    if not 0 <= used < 1:
        return inf
    full: float = used ** (sqrt(2 * (instances + 1)) - 1)
    wait_s = load.mean_s / free * full / (instances * (1 - used))
    return load.long_s / free + wait_s


def _numbers(instances: int, now: int) -> list[int]:
    """The numbers to compare: all of a few, else some in each region, and those next to the present one."""
    some, number = {0}, 1
    while number < instances:
        some.add(number)
        number += max(1, number // 6)
    return sorted(some | {kept for kept in (now - 1, now, now + 1) if 0 <= kept < instances})
