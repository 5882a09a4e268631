"""The packages: who may import whom, how long a file and a function may be, and where the test of a file is. Reads
source only.

To change who may import what, change PACKAGES or WALLS: that is a decision about the design, not about a test.
"""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parent.parent / "tetri"
FILE_LINES, FUNCTION_LINES = 450, 50
EVERYTHING = None


def package(packages, third=""):
    return packages if packages is EVERYTHING else frozenset(packages.split()), frozenset(third.split())


# package or module directly below tetri/ -> those, and the third-party packages, that it may import
PACKAGES = {
    "request": package("", "msgspec"),  # its records cross the wire
    "instance": package("request", "msgspec"),  # crosses the wire too
    "engine_request": package("request"),
    **dict.fromkeys(
        ("strict", "atomic", "clock", "faults", "metrics", "log", "control_groups", "private"), package("")
    ),
    "control_tokens": package("", ""),
    "terminal": package("", "click"),
    "paths": package("atomic", "click matplotlib"),
    "text": package("request control_tokens", "tokenizers jinja2"),
    "models": package("atomic", "torch transformers accelerate gguf xxhash"),
    "policy": package("request instance engine_request cost"),
    "wire": package("request instance", "msgspec"),
    "cost": package("engine_request strict"),
    "config": package("request policy strict faults"),
    "core": package("request instance engine_request cost policy wire"),
    "net": package("wire log private", "zmq msgspec"),
    "kv": package("request instance policy wire net log faults private", "numpy xxhash cupy nixl"),
    "engine": package(
        "request instance engine_request cost kv log models control_groups", "numpy xxhash torch vllm cupy"
    ),
    "predict": package("request atomic policy text log", "numpy msgpack xxhash torch transformers safetensors"),
    "profile": package("request instance cost engine", "numpy"),
    "rates": package("metrics wire", "msgspec"),  # for whoever looks on: top, and the gateway's page
    "sim": package(
        "request instance engine_request cost config metrics policy wire core engine kv executor"
        " text faults",  # with faults it detokenizes, and draws chances as a live deployment does
        "msgspec",
    ),
    "bench": package(EVERYTHING, "click rich matplotlib msgspec zmq numpy aiohttp torch vllm grafana_foundation_sdk"),
    "executor": package("core engine kv engine_request request instance wire"),
    "client": package("request wire config strict clock private", "zmq msgspec"),
    "proc": package(EVERYTHING, "click httptools msgspec prometheus_client supervisor starlette uvicorn uvloop"),
    "cli": package(EVERYTHING, "click rich msgspec"),  # a command reads what the broker answers as its records
    "__init__": package("client request"),
}
# Inside a package -> what of the same package it may import besides itself. Prefill and decode know nothing of each
# other: only the worker knows both.
WALLS = {
    "core/actions": (),
    "core/timers": (),
    "core/monitor": ("core/actions", "core/separation", "core/timers"),
    "core/instance": ("core/actions",),
    "core/length": ("core/instance",),
    "core/broker": ("core/actions", "core/timers"),
    "core/prefill": ("core/actions", "core/timers", "core/instance", "core/length"),
    "core/decode": ("core/actions", "core/timers", "core/instance", "core/length"),
    "core/worker": ("core/",),
    "kv/stream": ("kv/base", "kv/slab"),
    "kv/cuda": ("kv/base", "kv/lease", "kv/mapped", "kv/segment", "kv/slab", "kv/staging", "kv/store"),
    "kv/nixl": ("kv/base", "kv/segment", "kv/slab", "kv/staging"),
    "engine/base": (),
    "engine/plan": (),
    "engine/paged": ("engine/base", "engine/plan"),
    "engine/emulated": ("engine/base", "engine/paged", "engine/plan"),
    "engine/vllm": ("engine/base",),
}
# What only a few files of a room may import, and of the rooms that may import everything, what not.
ONLY_IN = {
    "torch": ("engine/vllm", "predict/", "models", "bench/overhead/direct", "bench/engine_speed/side"),
    "vllm": ("engine/vllm", "bench/overhead/direct", "bench/engine_speed/side", "bench/vllm_command"),
    "transformers": ("predict/", "models"),
    "accelerate": ("models",),
    "gguf": ("models",),
    "supervisor": ("proc/supervise",),
    "grafana_foundation_sdk": ("bench/dashboard",),
    **dict.fromkeys(("httptools", "starlette", "uvicorn", "uvloop"), ("proc/gateway",)),
    "prometheus_client": ("proc/metrics", "proc/metrics_server", "proc/gateway/live"),
    "cupy": ("kv/cuda", "engine/vllm/"),
    "nixl": ("kv/nixl",),
    "tetri.config": ("client/place", "config/", "proc/", "cli/", "bench/"),
    "tetri.strict": ("client/place", "config", "cost", "proc/", "cli/", "bench/"),
    "tetri.kv": ("kv/", "bench/", "engine/", "executor", "sim/", "proc/", "cli/"),
    "tetri.cli": ("cli/",),
    "tetri.proc": ("proc/", "cli/", "bench/"),
    "tetri.bench": ("bench/", "cli/"),  # of tetri-cli: for pictures
}
INSIDE_FUNCTIONS = {  # slow to import, or not always installed
    "models": {"torch", "transformers", "accelerate", "gguf", "xxhash"},
    "text": {"tokenizers", "jinja2"},
    "bench": {"rich", "matplotlib", "aiohttp", "torch", "vllm"},
    "paths": {"matplotlib"},
    "cli": {"rich", "tetri.bench", "tetri.client", "tetri.proc", "tetri.config", "tetri.models", "tetri.strict"},
    "__init__": {"tetri.client"},
}
# Time, chance and the world come in from outside: all of the standard library that decisions may use.
PURE = {"core", "policy", "client/conversation", "client/session", "engine/paged", "engine/plan"}
PURE_LIBRARY = {
    *("__future__", "abc", "collections", "dataclasses", "enum", "functools", "itertools", "statistics", "typing"),
    *("array", "bisect", "heapq", "math", "random", "hmac"),
}
PURE_NAMES = {"random": ("Random",), "hmac": ("compare_digest",)}  # of these, only what decides by its arguments alone


class Import(NamedTuple):
    module: str  # the full name of what is imported
    line: int
    deferred: bool  # inside a function or for type checking only
    names: tuple[str, ...] = ()


class Source:
    """`name`: its path below tetri/, without the suffix."""

    def __init__(self, name: str, text: str) -> None:
        self.name, self.package = name, name.split("/")[0]
        self.tree, self.lines = ast.parse(text, name), len(text.splitlines())
        self.imports = list(_imports(self.tree, deferred=False))


def _imports(node, deferred):
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, deferred)
        elif isinstance(child, ast.ImportFrom):
            names = tuple(alias.name for alias in child.names)
            # "from tetri import log" names packages, "from tetri.log import start" names one
            modules = [f"tetri.{name}" for name in names] if child.module == "tetri" else [child.module]
            for module in modules:
                yield Import("." * child.level + (module or ""), child.lineno, deferred, names)
        inner = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or _types_only(child)
        yield from _imports(child, deferred or inner)


def _types_only(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


SOURCES = [
    Source(path.relative_to(PACKAGE).with_suffix("").as_posix(), path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
]


def problems(source):
    """Every import that the tables above do not allow, as `file:line: what`."""
    packages, third = PACKAGES[source.package]
    for found in source.imports:
        parts = found.module.split(".")
        top = parts[0]
        key = ".".join(parts[:2]) if top == "tetri" else top
        where = f"tetri/{source.name}.py:{found.line}"
        if not top:
            yield f"{where}: relative import"
            continue
        if top == "tetri":
            target = parts[1] if len(parts) > 1 else "__init__"
            if target != source.package and packages is not EVERYTHING and target not in packages:
                yield f"{where}: {source.package} may not import {found.module}"
        elif top not in sys.stdlib_module_names and top not in third:
            yield f"{where}: {source.package} may not import {top}"
        walled = next((inside for inside in WALLS if f"{source.name}/".startswith(f"{inside}/")), None)
        if walled is not None and top == "tetri" and parts[1:2] == [source.package]:
            inside = "/".join(parts[1:])
            if inside != source.package and not inside.startswith((walled, *WALLS[walled])):
                yield f"{where}: {walled} may not import {found.module}"
        if key in ONLY_IN and not source.name.startswith(ONLY_IN[key]):
            yield f"{where}: {key} is for {', '.join(ONLY_IN[key])} only"
        if key in INSIDE_FUNCTIONS.get(source.package, ()) and not found.deferred:
            yield f"{where}: {key} must be imported inside the function that needs it"
        pure = PURE & {source.package, source.name} and top in sys.stdlib_module_names
        if pure and (top not in PURE_LIBRARY or found.names != PURE_NAMES.get(top, found.names)):
            yield f"{where}: {found.module} has no place where things are only decided"


def too_long(source):
    """The file and every function with too many lines, as `file: what`."""
    if source.lines > FILE_LINES:
        yield f"{source.name} has {source.lines} lines"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if (length := node.end_lineno - first + 1) > FUNCTION_LINES:
                yield f"{source.name}: {node.name} has {length} lines"


def test_every_package_has_a_line_in_the_table():
    assert {source.package for source in SOURCES} == {*PACKAGES}


@pytest.mark.parametrize("rule", [problems, too_long], ids=["imports", "sizes"])
def test_every_file_keeps_the_rule(rule):
    assert [problem for source in SOURCES for problem in rule(source)] == []


# Files without a test of their name, and the test that covers them: contracts, and what is tested with its callers.
TESTED_ELSEWHERE = {
    "core/prefill/home": "core/worker/test_home.py",
    "engine/base": "engine/test_emulated.py",
    "engine/plan": "engine/test_paged.py",
    "engine_request": "engine/test_paged.py",
    "kv/base": "kv/test_store.py",
    "net/errors": "net/test_hub.py",
    "policy/views": "policy/test_dispatch.py",
    "wire/clients": "wire/test_messages.py",
    "wire/events": "net/test_hub.py",
    "wire/handover": "wire/test_messages.py",
    "wire/load": "wire/test_messages.py",
    "wire/observation": "wire/test_messages.py",
    "proc/supervise": "proc/test_launch.py",
    "cli/predictor_scores": "cli/test_predictor_eval.py",
    "cli/predictor_train": "cli/test_predictor_eval.py",
    "bench/in_process": "bench/test_hidden_hook.py",
}
MOST_ELSEWHERE = 16
TESTED_AS_ONE = ("bench/", "sim/faulty")  # each folder below, or this folder, has one test of its own name


def places_of(name):
    """Where the test of a source file may be."""
    folder, _, stem = name.rpartition("/")
    yield f"{folder}/test_{stem}.py" if folder else f"test_{stem}.py"
    if folder.startswith(TESTED_AS_ONE):
        around, _, stem = folder.rpartition("/")
        yield f"{around}/test_{stem}.py"


def untested(names, tests):
    return [name for name in names if not name.endswith("__init__") and not tests & {*places_of(name)}]


def test_every_file_has_a_test_of_its_name():
    folder = PACKAGE.parent / "tests"
    tests = {path.relative_to(folder).as_posix() for path in folder.rglob("test_*.py")}
    assert untested([source.name for source in SOURCES], tests) == sorted(TESTED_ELSEWHERE)
    assert len(TESTED_ELSEWHERE) <= MOST_ELSEWHERE and tests.issuperset(TESTED_ELSEWHERE.values())


def test_where_the_test_of_a_file_is():
    names = ["core/prefill/queue", "bench/demo", "log", "bench/chaos/__main__", "sim/faulty/kv", "kv/__init__"]
    assert untested(names, {"core/test_queue.py", "core/test_prefill.py", "test_bench.py"}) == names[:-1]
    tests = {"core/prefill/test_queue.py", "bench/test_demo.py", "test_log.py", "bench/test_chaos.py"}
    assert untested(names, tests | {"sim/test_faulty.py"}) == []


def imported(source, names):
    """The files of `names` that a file imports, also inside functions and for types only."""
    for found in source.imports:
        top, *inner = found.module.split(".")
        path = "/".join(inner)
        modules = {f"{path}/{name}".lstrip("/") for name in found.names} & names
        whole = {path, f"{path}/__init__"} & names if len(modules) < max(len(found.names), 1) else set()
        if top == "tetri":
            yield from modules | whole


def circle(graph):
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def test_no_file_imports_itself_in_a_circle():
    names = {source.name for source in SOURCES}
    files = {source.name: {*imported(source, names)} for source in SOURCES}
    assert circle(files) is None
    packages = {}
    for name, others in files.items():
        packages.setdefault(name.split("/")[0], set()).update(other.split("/")[0] for other in others)
    assert circle({name: others - {name} for name, others in packages.items()}) is None
    known = {"a", "b", "c/__init__", "c/d"}
    texts = {"a": "def f():\n    from tetri import b", "b": "from tetri.c.d import x", "c/d": "from tetri.c import y"}
    graph = {name: {*imported(Source(name, text), known)} for name, text in texts.items()}
    assert graph == {"a": {"b"}, "b": {"c/d"}, "c/d": {"c/__init__"}} and circle(graph) is None
    assert circle({**graph, "c/__init__": {"a"}})


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("core/x", "import time", "only decided"),
        ("core/prefill/x", "from tetri.core.decode.batch import Batch", "core/prefill may not import"),
        ("core/worker/x", "from tetri.core.decode.batch import Batch", None),
        ("kv/cuda/x", "from tetri.kv.nixl.agent import Agent", "kv/cuda may not import"),
        ("core/x", "from random import choice", "only decided"),
        ("core/x", "from random import Random", None),
        ("core/x", "from hmac import new", "only decided"),
        ("policy/x", "def f():\n    import zmq", "may not import zmq"),
        ("core/x", "from tetri import config", "may not import tetri.config"),
        ("wire/x", "from tetri.core.broker.requests import Table", "may not import tetri.core"),
        ("engine/emulated", "import torch", "torch is for"),
        ("engine/vllm", "import torch", None),
        ("models", "import torch", "inside the function"),
        ("models", "def f():\n    import torch", None),
        ("cli/x", "from tetri.client import Client", "inside the function"),
        ("proc/x", "from tetri.cli import main", "tetri.cli is for"),
        ("kv/x", "from . import slab", "relative import"),
        ("client/x", "import msgpack", "may not import msgpack"),
        ("core/x", "\n" * 450, None),
        ("core/x", "\n" * 451, "core/x has 451 lines"),
        ("core/x", "@property\ndef f():" + "\n pass" * 48, None),
        ("core/x", "@property\ndef f():" + "\n pass" * 49, "core/x: f has 51 lines"),
    ],
)
def test_the_test_can_fail(name, text, says):
    source = Source(name, text)
    found = [*problems(source), *too_long(source)]
    assert (found == []) if says is None else (len(found) >= 1 and says in found[0])
