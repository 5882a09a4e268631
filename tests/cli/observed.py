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


def observation(*instances, epoch=1, serial=1, histograms=None, ended=0, status=None, **fields):
    """`ended`: choices that have ended since the broker's start; `fields`: moves, ended choices and events."""
    body = {**STATUS, "instances": [*instances], **(status or {})}
    measures = {"counts": {"requests_ended": {"stop": ended}}, "histograms": histograms or {}}
    return {
        **{"type": "observation", "epoch": epoch, "serial": serial, "status": body, "measures": measures},
        **{"moves": [], "ended": [], "events": [], "missed": 0, **fields},
    }


def typed(found):
    """The same as a record."""
    return msgspec.convert(found, Observation)
