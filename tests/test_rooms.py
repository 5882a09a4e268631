"""The rooms of the house: who may import whom, and how long a file and a function may be. Reads source only.

A room is a folder or a module directly below tetri/. To change who may import what, change ROOMS: that is a
decision about the design, not about a test.
"""

import ast
import sys
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tetri"
FILE_LINES, FUNCTION_LINES = 300, 50
EVERYTHING = None


def room(*rooms, third=()):
    return frozenset(rooms), frozenset(third)


# room -> the rooms and the third-party packages that it may import
ROOMS = {
    "request": room(third=["msgspec"]),  # its records cross the wire
    "instance": room("request", third=["msgspec"]),  # crosses the wire too
    "leg": room("request"),
    "strict": room(),
    "atomic": room(),
    "faults": room(),
    "metrics": room(),
    "log": room(),
    "text": room("request", third=["tokenizers", "jinja2"]),
    "models": room("atomic", third=["torch", "transformers", "accelerate", "gguf", "xxhash"]),
    "policy": room("request", "leg", "cost"),
    "wire": room("request", "instance", third=["msgspec"]),
    "cost": room("request", "leg"),
    "config": room("request", "policy", "strict", "faults"),
    "core": room("request", "instance", "leg", "cost", "policy", "wire"),
    "net": room("wire", "log", third=["zmq", "msgspec"]),
    "kv": room("request", "wire", "net", "log", "faults", third=["numpy", "xxhash", "cupy", "nixl"]),
    "engine": room("request", "leg", "cost", "kv", "log", third=["numpy", "xxhash", "torch", "vllm", "cupy"]),
    "predict": room(
        "request",
        "atomic",
        "policy",
        "text",
        "log",
        third=["numpy", "msgpack", "xxhash", "torch", "transformers", "safetensors"],
    ),
    "profile": room("request", "cost", "engine", third=["numpy"]),
    "sim": room(
        *("request", "instance", "leg", "cost", "config", "metrics", "policy", "wire", "core", "engine", "kv", "hands")
    ),
    "bench": room("request", "atomic", "client", "kv", "wire", "metrics", "config", "log", third=["matplotlib"]),
    "hands": room("core", "engine", "kv", "leg", "request", "wire"),
    "client": room("request", "config", "strict", third=["zmq", "msgpack"]),
    "proc": (EVERYTHING, frozenset({"click", "msgspec", "supervisor"})),
    "cli": (EVERYTHING, frozenset({"click", "rich"})),
    "__init__": room("client"),
}
# What only a few files of a room may import, and of the rooms that may import everything, what not.
ONLY_IN = {
    "torch": ("engine/vllm", "predict/", "models"),
    "vllm": ("engine/vllm",),
    "transformers": ("predict/", "models"),
    "accelerate": ("models",),
    "gguf": ("models",),
    "supervisor": ("proc/supervise",),
    "cupy": ("kv/cuda", "engine/vllm_memory"),
    "nixl": ("kv/nixl",),
    "tetri.config": ("client/place", "config/", "proc/", "cli/"),
    "tetri.strict": ("client/place", "config", "proc/", "cli/"),
    "tetri.kv": ("kv/", "bench/", "engine/", "hands", "sim/", "proc/", "cli/"),
    "tetri.cli": ("cli/",),
    "tetri.proc": ("proc/", "cli/"),
}
INSIDE_FUNCTIONS = {  # slow to import, or not always installed
    "models": {"torch", "transformers", "accelerate", "gguf", "xxhash"},
    "text": {"tokenizers", "jinja2"},
    "cli": {"rich", "tetri.client", "tetri.proc", "tetri.config", "tetri.models", "tetri.strict"},
    "__init__": {"tetri.client"},
}
# Time, chance and the world come in from outside: all of the standard library that decisions may use.
PURE = {"core", "policy", "client/conversation", "engine/paged", "engine/plan"}
PURE_LIBRARY = {
    *("__future__", "abc", "collections", "dataclasses", "enum", "functools", "itertools", "typing"),
    *("bisect", "heapq", "math", "random"),  # of random: the class, to be given a seeded one
}


@dataclass(frozen=True)
class Import:
    module: str  # the full name of what is imported
    line: int
    deferred: bool  # inside a function or for type checking only
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    path: Path
    tree: ast.Module
    lines: int

    @property
    def name(self) -> str:
        return self.path.relative_to(PACKAGE).with_suffix("").as_posix()

    @property
    def room(self) -> str:
        return self.name.split("/")[0]

    def imports(self):
        yield from _imports(self.tree, deferred=False)


def _imports(node, deferred):
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, deferred)
        elif isinstance(child, ast.ImportFrom):
            names = tuple(alias.name for alias in child.names)
            # "from tetri import log" names rooms, "from tetri.log import start" names one
            modules = [f"tetri.{name}" for name in names] if child.module == "tetri" else [child.module]
            for module in modules:
                yield Import("." * child.level + (module or ""), child.lineno, deferred, names)
        inner = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or _types_only(child)
        yield from _imports(child, deferred or inner)


def _types_only(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def sources():
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        yield Source(path, ast.parse(text, str(path)), len(text.splitlines()))


SOURCES = list(sources())
every_file = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)


def problems(source):
    """Every import that the tables above do not allow, as `file:line: what`."""
    rooms, third = ROOMS[source.room]
    for found in source.imports():
        parts = found.module.split(".")
        top = parts[0]
        key = ".".join(parts[:2]) if top == "tetri" else top
        where = f"tetri/{source.name}.py:{found.line}"
        if not top:
            yield f"{where}: relative import"
            continue
        if top == "tetri":
            target = parts[1] if len(parts) > 1 else "__init__"
            if target != source.room and rooms is not EVERYTHING and target not in rooms:
                yield f"{where}: room {source.room} may not import {found.module}"
        elif top not in sys.stdlib_module_names and top not in third:
            yield f"{where}: room {source.room} may not import {top}"
        if key in ONLY_IN and not source.name.startswith(ONLY_IN[key]):
            yield f"{where}: {key} is for {', '.join(ONLY_IN[key])} only"
        if key in INSIDE_FUNCTIONS.get(source.room, ()) and not found.deferred:
            yield f"{where}: {key} must be imported inside the function that needs it"
        pure = PURE & {source.room, source.name} and top in sys.stdlib_module_names
        if pure and (top not in PURE_LIBRARY or (top == "random" and found.names != ("Random",))):
            yield f"{where}: {found.module} has no place where things are only decided"


@every_file
def test_imports(source):
    assert source.room in ROOMS, f"{source.name}: give this room a line in ROOMS"
    assert list(problems(source)) == []


@every_file
def test_sizes(source):
    assert source.lines <= FILE_LINES, f"{source.name} has {source.lines} lines"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            length = node.end_lineno - first + 1
            assert length <= FUNCTION_LINES, f"{source.name}: {node.name} has {length} lines"


def test_no_room_imports_itself_in_a_circle():
    graph = {}
    for source in SOURCES:
        for found in source.imports():
            parts = found.module.split(".")
            if parts[0] == "tetri" and parts[1:2] not in ([], [source.room]):
                graph.setdefault(source.room, set()).add(parts[1])
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"rooms import each other in a circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("core/x", "import time", "only decided"),
        ("core/x", "from random import choice", "only decided"),
        ("core/x", "from random import Random", None),
        ("policy/x", "def f():\n    import zmq", "may not import zmq"),
        ("core/x", "from tetri import config", "may not import tetri.config"),
        ("wire/x", "from tetri.core.broker.requests import Row", "may not import tetri.core"),
        ("engine/emulated", "import torch", "torch is for"),
        ("engine/vllm", "import torch", None),
        ("models", "import torch", "inside the function"),
        ("models", "def f():\n    import torch", None),
        ("cli/x", "from tetri.client import Client", "inside the function"),
        ("proc/x", "from tetri.cli import main", "tetri.cli is for"),
        ("kv/x", "from . import slab", "relative import"),
        ("client/x", "import msgspec", "may not import msgspec"),
    ],
)
def test_the_test_can_fail(name, text, says):
    found = list(problems(Source(PACKAGE / f"{name}.py", ast.parse(text), 1)))
    assert (found == []) if says is None else (len(found) >= 1 and says in found[0])
