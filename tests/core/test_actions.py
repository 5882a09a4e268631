"""What cores say and hear: which of it each loop carries out, and what comes back."""

import inspect
from types import UnionType
from typing import get_args

from tetri.core import actions
from tetri.request import Value


def kinds(union: UnionType) -> set[type]:
    found: set[type] = set()
    for each in get_args(union):
        found |= kinds(each) if isinstance(each, UnionType) else {each}
    return found


SAID = kinds(actions.Action)
HEARD = kinds(actions.BrokerInput) | kinds(actions.MonitorInput) | kinds(actions.WorkerInput)


def test_all_that_stands_here_is_said_or_heard_and_nothing_is_both():
    records = {each for _, each in inspect.getmembers(actions, inspect.isclass) if issubclass(each, Value)}
    mine = {each for each in records if each.__module__ == actions.__name__}
    assert mine == (SAID | HEARD) & mine and SAID.issubset(mine) and not SAID & HEARD
