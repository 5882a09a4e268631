"""The deployment of one case, what it reports of itself, and what must be left of it: nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tetri.bench.deployment import EMULATED, START_S, after_the_end, configured, logged, running
from tetri.bench.report import BenchError
from tetri.bench.torture.case import Findings
from tetri.client import Client
from tetri.config import Config
from tetri.proc.supervise import Supervisor

STEP_S = 0.02  # of a decode step, unless a case asks for another
_STEPS = """\
prefill = [[1, {prefill_s}], [100000, {prefill_s}]]
decode = [[1, {decode_s}], [100000, {decode_s}]]
"""


@dataclass(frozen=True, slots=True)
class Deployed:
    """A running deployment."""

    config: Config

    def pid(self, name: str) -> int:
        """The process id of the broker, the monitor or a worker. Raises BenchError while it does not run."""
        programs = Supervisor(self.config.run_dir).programs() or []
        found = next((program.pid for program in programs if program.name == name), 0)
        if not found:
            raise BenchError(f"{name} does not run")
        return found

    def status(self) -> dict[str, Any]:
        """Ask the broker, as a client of its own."""
        with Client(self.config.clients_address) as client:
            return client.status()

    def instance(self, iid: str) -> dict[str, Any]:
        """The status of one instance. Raises BenchError if the broker does not know it."""
        found: dict[str, dict[str, Any]] = {each["iid"]: each for each in self.status()["instances"]}
        if iid not in found:
            raise BenchError(f"the broker does not know {iid}")
        return found[iid]

    def counter(self, name: str) -> int:
        """A counter of the broker, 0 before it first counts."""
        return int(self.status()["counters"].get(name, 0))

    def log(self, name: str) -> str:
        """The log of a process."""
        return Supervisor(self.config.run_dir).log(name).read_text(errors="replace")


def workers(prefill: int, decode: int) -> str:
    """The setting for so many workers: p0, p1, ... and d0, d1, ..."""
    roles = [("prefill", number) for number in range(prefill)] + [("decode", number) for number in range(decode)]
    tables = [f"{{iid='{role[0]}{number}', role='{role}'}}" for role, number in roles]
    return f"worker=[{', '.join(tables)}]"


@contextmanager
def deployed(
    folder: Path,
    found: Findings,
    settings: Sequence[str] = (),
    prefill_s: float = STEP_S / 2,
    decode_s: float = STEP_S,
) -> Iterator[Deployed]:
    """A deployment of emulated engines whose steps last so many seconds. After it, nothing of it may be left, and no
    traceback be in its logs. Raises LaunchError."""
    steps = folder / "steps.toml"
    steps.write_text(_STEPS.format(prefill_s=prefill_s, decode_s=decode_s))
    own = [f"engine.cost={steps}", "emulated.token_bytes=8"]
    config = configured(EMULATED, folder, "torture", [*own, *settings])
    with running(config, lambda text: None, START_S):
        yield Deployed(config)
    found.exactly("left_over", after_the_end(config), [])
    found.exactly("crashes", logged(config).count("Traceback (most recent call last)"), 0)
