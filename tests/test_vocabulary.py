"""One vocabulary: the words that the code has left behind stay away from identifiers, messages and counters, and
whatever others may call says what it does. Reads source only; docs/design.md has the glossary."""

import ast
import re
from pathlib import Path

import msgspec
import pytest

from tetri.core.decode.kv_receive import COUNTED
from tetri.wire import bulk, clients, handover, messages

PACKAGE = Path(__file__).parent.parent / "tetri"
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef

# word -> what says it now; as a whole word of an identifier ("kv_send" has the words kv and send)
REPLACED = {
    **dict.fromkeys(("seat", "seats"), "decode request"),
    **dict.fromkeys(("job", "jobs"), "prefill request"),
    **dict.fromkeys(("leg", "legs"), "engine request"),
    **dict.fromkeys(("desk", "letter", "letters"), "delivery, outbox"),
    **dict.fromkeys(("word", "words", "worded", "unword"), "text; Detokenize, Detokenized, Release"),
    **dict.fromkeys(("life", "news", "contacts"), "lifecycle, worker events, peer events"),
    **dict.fromkeys(("company", "kin", "stranger"), "compatibility, its key, incompatibility"),
    **dict.fromkeys(("leaving", "landing", "parcel", "parcels"), "KV send, KV receive, KV chunk"),
    **dict.fromkeys(("take", "taken", "taking", "took"), "fetch"),
    **dict.fromkeys(("outlook", "foresight", "track", "odds"), "load forecast, estimator, accuracy, distribution"),
    **dict.fromkeys(("foreseen", "foretold"), "length update, hidden-state estimate"),
    **dict.fromkeys(("hands", "contact"), "action executor"),
    **dict.fromkeys(("roster", "beat", "claim", "claims"), "membership, heartbeat, reservation"),
    **dict.fromkeys(("lapsed", "stranded", "forsaken", "jammed"), "preempted, unplaceable, grant lost, slot deadlock"),
    **dict.fromkeys(("doorman", "bell", "tap"), "ZAP handler, waker, hidden-state hook"),
    **dict.fromkeys(("told", "said", "heard", "say", "hear"), "reported, sent, received"),
    **dict.fromkeys(("forgive", "spared", "spoilt", "remind"), "retry allowed, not counted, corrupt, resend"),
    "room": "budget, buffer, package",
}
# Whole identifiers that others have named.
KEPT = {
    "presence_penalty",  # of the sampling parameters that clients know
    "took_s",  # of RoleChanged
}


def words(name):
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[A-Z]", name)]


def stale(name):
    """The words in a name that have been replaced, each with what says it now."""
    return [] if name in KEPT else [f"{word} -> {REPLACED[word]}" for word in words(name) if word in REPLACED]


def identifiers(tree):
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)):
                yield name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.alias(name=name, asname=asname):
                yield from (*name.split("."), asname or "")


def test_no_identifier_has_a_word_that_was_replaced():
    found = {}
    for path, tree in TREES.items():
        where = path.relative_to(PACKAGE)
        names = {*identifiers(tree), *where.with_suffix("").parts}
        found.update({f"{where}: {name}": stale(name) for name in sorted(names) if stale(name)})
    assert found == {}


def records(*unions):
    """All records that can stand in a message of these unions."""
    found, todo = {}, [kind for union in unions for kind in union.__args__]
    while todo:
        kind = todo.pop()
        todo += getattr(kind, "__args__", ())
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind not in found:
            info = msgspec.structs.fields(kind)
            found[kind] = [field.encode_name for field in info]
            todo += [field.type for field in info]
    return found


def test_no_message_nor_counter_has_a_word_that_was_replaced():
    unions = (
        *(messages.WorkerEvent, messages.InboxMessage, clients.ClientMessage, clients.BrokerReply),
        *(bulk.BulkRequest, bulk.BulkReply, messages.LoadReport | messages.ClusterView),
    )
    found = records(*unions)
    assert handover.Handle in found  # it has looked into the messages
    names = {name for fields in found.values() for name in fields} | {*COUNTED}
    names |= {str(kind.__struct_config__.tag) for kind in found if kind.__struct_config__.tag}
    names |= {key for path, tree in TREES.items() if "core" in path.parts for key in counters(tree)}
    assert "restarts" in names and "heartbeat" in names
    assert {name: stale(name) for name in names if stale(name)} == {}


def counters(tree):
    """The literal keys of everything that is called `counters`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("counters"):
            yield from (leaf.value for leaf in ast.walk(node.slice) if isinstance(getattr(leaf, "value", None), str))


# ------------------------------------------------------------ docstrings


def contract_methods():
    """Methods that a documented protocol or abstract class names: who implements one need not say it again."""
    for node in (node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        whole = {ast.unparse(base) for base in node.bases} & {"Protocol", "ABC"}
        for method in node.body:
            abstract = whole or "abstractmethod" in map(ast.unparse, getattr(method, "decorator_list", ()))
            if isinstance(method, FUNCTIONS) and documented(method) and abstract:
                yield method.name


def documented(node):
    return ast.get_docstring(node) is not None


def public(body):
    return [node for node in body if isinstance(node, FUNCTIONS | ast.ClassDef) and not node.name.startswith("_")]


CONTRACT = set(contract_methods())


def undocumented(tree):
    for node in public(tree.body):
        if not documented(node):
            yield node.name
        if isinstance(node, ast.ClassDef):
            for method in public(node.body):
                if not documented(method) and method.name not in CONTRACT:
                    yield f"{node.name}.{method.name}"


def test_what_others_may_call_has_a_docstring():
    found = {path.relative_to(PACKAGE).as_posix(): list(undocumented(tree)) for path, tree in TREES.items()}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("def seat_of(): 'x'", ["seat_of"]),
        ("self._jobs = 1", ["_jobs"]),
        ("def f(*, leg): 'x'", ["leg"]),
        ("f(odds=1)", ["odds"]),
        ("from tetri.core import landing", ["landing"]),
        ("class TurnedAway:\n 'x'\n def room(self): 'x'", ["room"]),
        ("legend = keyword = roomy = 1", []),
    ],
)
def test_the_test_of_words_can_fail(code, names):
    assert [name for name in identifiers(ast.parse(code)) if stale(name)] == names


def test_the_test_of_docstrings_can_fail():
    code = "def f(): pass\ndef _g(): pass\nclass C:\n 'x'\n def m(self): pass\n def close(self): pass\n"
    assert list(undocumented(ast.parse(code))) == ["f", "C.m"]
