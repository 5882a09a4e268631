"""Observations and Timelines, as a broker sends them."""

import msgspec
from fake_broker import STATUS, instance

from tetri.wire.clients import Observation
from tetri.wire.load import Load
from tetri.wire.observation import Activity


def member(iid, role, load=None, activity=None, **fields):
    """An instance with 100 blocks in a Status; `load`, `activity`: fields that are not as when it is idle."""
    load = msgspec.to_builtins(Load(**{"free_blocks": 100, **(load or {})}))
    activity = msgspec.to_builtins(Activity(**(activity or {})))
    return instance(iid, role, blocks=100, load=load, activity=activity, **fields)


def histogram(counts, total=0.0):
    return {"bounds": [0.1, 0.2, 0.4], "counts": counts, "total": total}


def observation(*instances, epoch=1, serial=1, histograms=None, ended=0, kept=(0, 0), status=None, **fields):
    """`ended`: choices that have ended since the broker's start; `kept`: how many kept their limits, and how many
    missed that to the first token; `fields`: moves, ended choices and events."""
    results = dict(zip(("met", "ttft"), kept, strict=True))
    body = {**STATUS, "instances": [*instances], "slo_requests": results, **(status or {})}
    measures = {"counts": {"requests_ended": {"stop": ended}}, "histograms": histograms or {}}
    return {
        **{"type": "observation", "epoch": epoch, "serial": serial, "status": body, "measures": measures},
        **{"moves": [], "ended": [], "events": [], "missed": 0, **fields},
    }


def typed(found):
    """The same as a record."""
    return msgspec.convert(found, Observation)


def timeline(**fields):
    """A choice that was retried, decoded elsewhere then, and preempted there."""
    stages = [
        *(["queued", 1, "p0", 0.0, 0.1], ["prefill", 1, "p0", 0.1, 0.4], ["decode", 1, "d0", 0.5, 0.5]),
        *(["queued", 2, "p0", 1.0, 0.25], ["prefill", 2, "p0", 1.25, 0.25], ["decode", 2, "d1", 1.5, 0.5]),
    ]
    steps = [[0.5, 0.25, "d0", 1, 4, 0, 1], [0.75, 0.25, "d0", 1, 2, 0, 1], [1.5, 0.4, "d1", 4, 1, 0, 4]]
    known = {
        **{"type": "timeline", "rid": "r1", "choice": 0, "choices": 1, "age_s": 12.0, "prompt_tokens": 768},
        **{"outputs": 7, "attempts": 2, "stage": "done", "reason": "length", "error": None, "ttft_s": 0.5},
        **{"tpot_s": 0.25, "jct_s": 2.0, "receipt": None, "stages": stages, "events": EVENTS, "left_out": 0},
        **{"slo": {"ttft_s": 0.4, "tpot_s": None}, "slo_result": "ttft"},
        "steps": [[0.4, 0.1, "p0", 1, 0, 256, 1], *steps, [1.9, 0.1, "d1", 1, 1, 128, 1]],
    }
    return {**known, **fields}


def event(kind, at, iid, seconds=0.0, *, attempt=1, peer="", first=0, last=0, size=0, note=""):
    return [kind, "r1", attempt, at, iid, seconds, peer, first, last, size, note]


EVENTS = [
    event("deferred", 0.1, "p0", peer="d1"),
    event("refused", 0.11, "p0", peer="d1", note="draining"),
    event("offered", 0.12, "p0", peer="d0"),
    event("granted", 0.13, "p0", peer="d0"),
    event("chunk", 0.15, "p0", 0.1, first=0, last=512, size=512),
    event("export", 0.25, "p0", 0.01, first=0, last=32, size=0),
    event("fetch", 0.26, "d0", 0.1, peer="p0", first=0, last=32, size=2_000_000, note="shm"),
    event("fetch", 0.3, "d0", 0.1, peer="p0", first=32, last=48, note="shm: corrupt"),
    event("chunk", 0.4, "p0", 0.1, first=512, last=768, size=300),
    event("retry", 1.0, "broker", attempt=2, note="d0 was lost"),
    event("migrated", 1.5, "d1", attempt=2, peer="d0"),
    event("preempted", 1.6, "d1", attempt=2),
    event("recompute", 1.7, "d1", 0.1, attempt=2, first=0, last=771, size=771),
]
