"""How calls go through the files of the cores while requests are served: down, and never back up. A file that stands
twice on the call stack, with another between, can only be understood together with that one."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

import tetri.core
from tests.sim.shapes import ONE, some_faults, some_shape, story, tight_shape
from tetri.sim.setup import Timeouts
from tetri.sim.traces import Arrival
from tetri.sim.world import World

CORES = Path(tetri.core.__file__).parent
PLAIN = replace(ONE, timeouts=Timeouts())


class Calls:
    """Calls into the files of a folder. `back`: the stacks, from outside to inside, in which a file stands twice with
    another between. `entered`: for each call from outside, the files that it enters."""

    def __init__(self, folder: Path) -> None:
        self.folder = f"{folder}/"
        self.stack: list[str] = []
        self.back: set[tuple[str, ...]] = set()
        self.entered: list[set[str]] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        before = sys.getprofile()
        sys.setprofile(self.profile)
        try:
            yield
        finally:
            sys.setprofile(before)

    def profile(self, frame, event, arg):
        if event in ("call", "return"):  # of Python code, not of C
            path = frame.f_code.co_filename
            if path.startswith(self.folder):
                if event == "call":
                    self.call(path.removeprefix(self.folder).removesuffix(".py"))
                else:
                    self.stack.pop()

    def call(self, name):
        stack = self.stack
        if not stack:
            self.entered.append(set())
        elif name != stack[-1] and name in stack:
            self.back.add(
                (*[each for each, after in zip(stack, stack[1:], strict=False) if each != after], *stack[-1:], name)
            )
        stack.append(name)
        self.entered[-1].add(name)

    def most(self):
        """How many files one call from outside enters at most."""
        return max(map(len, self.entered))

    def files(self):
        return set().union(*self.entered)


@pytest.mark.parametrize(
    ("setup", "most"),
    [
        (PLAIN, 19),
        (replace(PLAIN, prefill=0, decode=0, mixed=1), 21),
        (replace(PLAIN, rules=replace(ONE.rules, length="noisy")), 19),
    ],
    ids=["one of each", "one that does both", "lengths are predicted"],
)
def test_one_request_never_comes_back_into_a_file_that_it_has_left(setup, most):
    """Most are entered in a tick with a heartbeat, a load report and a step. Any step grants deferred offers first, and
    both reports tell of them: so each tick looks into `decode/deferred`."""
    calls = Calls(CORES)
    world = World(setup, [Arrival(0.0, 14, 4)])
    with calls.recorded():
        result = world.run()
    assert [outcome.state for outcome in result.outcomes] == ["done"]
    assert {"broker/lifecycle", "prefill/dispatcher", "decode/kv_receive", "decode/batch"} <= calls.files()
    assert calls.back == set() and calls.most() <= most


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("shape", [some_shape, tight_shape])
def test_nor_do_many_where_much_goes_wrong(shape, seed):
    calls = Calls(CORES)
    with calls.recorded():
        story(seed, some_faults(seed), shape(seed))
    assert calls.back == set() and calls.most() <= 28


# ---------------------------------------------------------------- what the test is worth


def made(folder, name, text):
    path = folder / f"{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "back"),
    [
        ("def begin(ask): return ask(end)\ndef end(): return inner()\ndef inner(): return 1", {("a", "b", "a")}),
        ("def begin(ask):\n try: ask(None)\n except TypeError: return inner()\ndef inner(): return 1", set()),
    ],
    ids=["back", "after an error"],
)
def test_a_call_back_is_found(tmp_path, text, back):
    a = made(tmp_path, "a", text)
    b = made(tmp_path, "b", "def ask(other): return other()")
    calls = Calls(tmp_path)
    with calls.recorded():
        assert a.begin(b.ask) == 1
    assert (calls.back, calls.most()) == (back, 2)
