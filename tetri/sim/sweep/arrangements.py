"""The arrangements that the sweep compares on the same instances.

coupled-rr-C     every instance does both phases, as vLLM, with chunks of C tokens; requests go around
coupled-ll-C     as above; a request goes to the instance with the fewest open requests
split-P+D-C      P prefill and D decode instances, by the live cores, with chunks of C tokens
auto             instances of the role auto, by the live cores
"""

from __future__ import annotations

from dataclasses import dataclass, replace

CHUNKS = (256, 512, 2048)
MOST_SPLITS = 8  # all splits of fewer instances; of more, those with these shares of prefill instances:
SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4)
AUTO = "auto"
TANDEM = "tandem"  # an estimate of a split (see `quick`)


@dataclass(frozen=True, slots=True)
class Arrangement:
    """One arrangement. `kind`: coupled-rr, coupled-ll, split, tandem or auto. `prefill`, `decode`: instances of a
    split. `chunk`: most tokens of a step; 0: as deployed."""

    kind: str
    prefill: int = 0
    decode: int = 0
    chunk: int = 0

    @property
    def name(self) -> str:
        """The name of the arrangement."""
        roles = f"-{self.prefill}+{self.decode}" if self.prefill else ""
        return f"{self.kind}{roles}" + (f"-{self.chunk}" if self.chunk else "")

    @property
    def estimate(self) -> Arrangement:
        """Of a split: its estimate."""
        return replace(self, kind=TANDEM)


def fixed(instances: int) -> list[Arrangement]:
    """Every fixed arrangement of so many instances."""
    counts = range(1, instances) if instances <= MOST_SPLITS else [round(share * instances) for share in SHARES]
    coupled = [Arrangement(kind, chunk=chunk) for kind in ("coupled-ll", "coupled-rr") for chunk in CHUNKS]
    splits = [Arrangement("split", count, instances - count, chunk) for count in counts for chunk in CHUNKS]
    return coupled + splits


AUTOMATIC = Arrangement(AUTO)


def named(name: str, instances: int) -> Arrangement:
    """The arrangement with this name. Raises KeyError."""
    return {each.name: each for each in (*fixed(instances), AUTOMATIC)}[name]
