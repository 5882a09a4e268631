"""Groups of tests, and what is started once for all tests of a group."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

#: Files in tests/engine/vllm whose tests share engines; the tests of any other file are a group of their own.
TOGETHER = {
    **dict.fromkeys(("connector", "engine", "hidden", "choices", "logprobs", "writer"), "float32"),
    **dict.fromkeys(("live", "flip", "answers", "auto"), "live"),
}
#: Those that take longest, in the order in which they begin: the processes that share the tests end together then.
LONGEST = (
    *("float32", "tests/engine/vllm/test_bfloat16.py", "live", "tests/engine/vllm/test_scheduler.py"),
    *("tests/engine/vllm/test_predictor.py", "tests/engine/vllm/test_tight.py"),
    *("tests/proc/test_launch.py", "tests/sim/test_faulty.py", "tests/bench/test_chaos.py"),
    *("tests/kv/nixl/test_mover.py", "tests/proc/test_live_faults.py", "tests/test_docs_commands.py"),
    *("tests/bench/test_parity.py", "tests/proc/test_live_predictor.py", "tests/proc/test_live_policies.py"),
)


def group(nodeid: str) -> str:
    """Tests of a group run one after another in one process."""
    file = nodeid.partition("::")[0]
    return TOGETHER.get(file.removeprefix("tests/engine/vllm/test_").removesuffix(".py"), file)


class Shared:
    """What was started for the tests of a group, by its settings; it ends with the group's last test."""

    def __init__(self) -> None:
        self.known: dict[object, Any] = {}
        self.leaving = ExitStack()

    def get(self, settings: object, start: Callable[[], AbstractContextManager[Any]]) -> Any:
        if settings not in self.known:
            self.known[settings] = self.leaving.enter_context(start())
        return self.known[settings]

    def close(self) -> None:
        self.known.clear()
        self.leaving.close()
