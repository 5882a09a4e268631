"""Both clients are the same to their callers, but for await."""

import inspect

import pytest

import tetri
from tetri.client import AsyncStream, Operator, Stream


def public(kind):
    return {name for name in dir(kind) if not name.startswith("_")}


@pytest.mark.parametrize("name", ["__init__", "generate", "stream", "events", "cancel", "status", "close"])
def test_both_clients_take_the_same_arguments(name):
    one, other = (inspect.signature(getattr(kind, name)) for kind in (tetri.Client, tetri.AsyncClient))
    assert list(one.parameters.values()) == list(other.parameters.values())


def test_both_offer_the_same():
    assert public(tetri.Client) == public(tetri.AsyncClient)
    assert public(Stream) - public(AsyncStream) == {"cancel_soon"}  # for signal handlers, which asyncio has apart
    assert public(AsyncStream) <= public(Stream)


@pytest.mark.parametrize("kind", [tetri.Client, tetri.AsyncClient, Operator])
def test_every_method_says_what_it_does(kind):
    assert [name for name in public(kind) if name != "close" and not inspect.getdoc(getattr(kind, name))] == []
