"""Observations as the broker's client returns them."""

from fake_broker import STATUS, instance


def observation(*instances, epoch=1, serial=0, counts=None, histograms=None, happened=None, **status):
    measures = {"counts": counts or {}, "histograms": histograms or {}}
    found = {"epoch": epoch, "serial": serial, "status": {**STATUS, "instances": [*instances], **status}}
    return {**found, "measures": measures, "moves": [], "ended": [], "events": [], "missed": 0, **(happened or {})}


def histogram(*counts, total=0.0):
    return {"bounds": [1.0, 2.0, 4.0], "counts": [*counts], "total": total}


def worker(iid="d0", role="decode", load=None, received=None, **fields):
    """An instance; `received`: bytes by path. Fields of its activity, and others."""
    made = instance(iid, role)
    activity = {name: fields.pop(name) for name in [*fields] if name in made["activity"]}
    made["activity"].update(activity)
    for path, size in (received or {}).items():
        made["activity"]["received"][path] = {"chunks": 1, "bytes": size, "seconds": 0.1, "failed": 0}
    made["load"].update(load or {})
    return {**made, **fields}
