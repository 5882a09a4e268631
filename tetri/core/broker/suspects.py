"""Which request kills workers. When a worker dies, the broker does not know why. It counts the death for each request
of which the worker held a choice: what was in the step is known to the worker alone, and its last messages may be lost.

A request of SUSPECT_DEATHS deaths is a suspect, with all its choices, which have the prompt in common. Workers compute
it in lone steps, one at a time (Assign.alone): the whole prefill, and the first decode steps of each choice. Before and
after a lone step the engine waits until the broker knows of it (LoneStep, Proceed). So when a worker dies in between,
the broker knows that nothing else was computed, and ends the request. Otherwise the death is nobody's fault as far as
anybody knows: the requests start over, and their attempts do not count.

A lost worker that comes back as the same process had not died, so its loss counts for nobody. Therefore a request ends
only a second after the death.

Each attempt avoids the instances that were lost with the request, so that a machine that always dies does not look like
a request that kills."""

from __future__ import annotations

from collections.abc import Iterable

from tetri.core.broker.requests import Request
from tetri.policy.views import PrefillPool

SUSPECT_DEATHS = 2
GUILTY = "it kills workers"  # how the error of such a request begins


def count(request: Request, iid: str, incarnation: int) -> None:
    """This worker was lost with the request. Two reports of one loss count once."""
    if (iid, incarnation) not in request.deaths:
        request.deaths.append((iid, incarnation))


def is_suspect(request: Request) -> bool:
    """Whether the request must be computed alone."""
    return len(request.deaths) >= SUSPECT_DEATHS


def is_guilty(request: Request, alone: tuple[str, int] | None, max_deaths: int) -> bool:
    """Whether the last of the request's deaths seems its own doing. `alone`: id and attempt of the choice whose lone
    step the worker ran when it died, None if it ran none."""
    own = any((choice.id, choice.attempt) == alone for choice in request.choices)
    return own and len(request.deaths) >= max_deaths


def verdict(request: Request) -> str:
    """The error of a guilty request, in one line."""
    lost = [iid for iid, _ in request.deaths]
    return (
        f"{GUILTY}: {len(lost)} of them were lost with it ({', '.join(lost)}), and the last one, {lost[-1]}, while it "
        "computed this request alone"
    )


def clear(requests: Iterable[Request], iid: str, incarnation: int) -> None:
    """This worker is back: it had not died."""
    for request in requests:
        if request.deaths:
            request.deaths = [death for death in request.deaths if death != (iid, incarnation)]


def lost_with(request: Request) -> list[str]:
    """The instances that the next attempt avoids."""
    return [*dict.fromkeys(iid for iid, _ in request.deaths)] if request.deaths else []


def away_from(iids: list[str], pool: PrefillPool) -> PrefillPool:
    """The pool without these instances; with them if there is no other."""
    columns = [column for column, iid in enumerate(pool.iids) if iid not in iids] if iids else []
    if not columns:
        return pool
    new = {column: place for place, column in enumerate(columns)}
    return PrefillPool(
        iids=[pool.iids[column] for column in columns],
        queued_s=[pool.queued_s[column] for column in columns],
        share=[pool.share[column] for column in columns],
        requests=[pool.requests[column] for column in columns],
        ttft_s=pool.ttft_s,
        last=new.get(pool.last, -1),
    )
