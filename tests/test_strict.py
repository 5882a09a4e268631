"""Tables into dataclasses: what a field may hold, and the line that says so. tests/config has the real tables."""

from dataclasses import dataclass
from typing import Any

import pytest

from tetri.strict import REQUIRED, ConfigError, choice, number, path, section, text


@dataclass(frozen=True)
class Lamp:
    name: str = text(REQUIRED, "[a-z]+", "letters from a to z")
    watts: int = number(40, 1, 100, was="power")
    warmth: float = number(0.5, 0.0, 1.0)
    kind: str = choice("led", "led", "", "neon")
    note: str = ""
    on: bool = False


def read(**table: Any) -> Lamp:
    return section(Lamp, table, "x.toml", "lamp")


def test_what_is_not_given_has_its_default_and_whole_numbers_are_numbers() -> None:
    assert read(name="a") == Lamp("a", 40, 0.5, "led", "", False)
    made = read(name="ab", watts=100, warmth=1, kind="", note="\n", on=True)
    assert made == Lamp("ab", 100, 1.0, "", "\n", True) and isinstance(made.warmth, float)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({}, "x.toml: lamp: name is missing"),
        ({"name": "a", "colour": 1}, "x.toml: lamp.colour: unknown key; allowed: name, watts, warmth, kind, note, on"),
        ({"name": "a", "power": 1}, "x.toml: lamp.power: is called watts now: rename it"),
        ({"name": "A"}, 'x.toml: lamp.name: must be letters from a to z, got "A"'),
        ({"name": "a\n"}, 'x.toml: lamp.name: must be letters from a to z, got "a\\n"'),
        ({"name": 1}, "x.toml: lamp.name: must be a text, got 1"),
        ({"name": "a", "watts": 1.0}, "x.toml: lamp.watts: must be a whole number from 1 to 100, got 1.0"),
        ({"name": "a", "watts": True}, "x.toml: lamp.watts: must be a whole number from 1 to 100, got true"),
        ({"name": "a", "warmth": float("nan")}, "x.toml: lamp.warmth: must be a number from 0.0 to 1.0, got NaN"),
        ({"name": "a", "kind": "gas"}, 'x.toml: lamp.kind: must be one of: led, "", neon, got "gas"'),
        ({"name": "a", "on": 1}, "x.toml: lamp.on: must be true or false, got 1"),
        ({"name": "a", "watts": 10**5000}, "x.toml: lamp.watts: must be a whole number from 1 to 100, got something"),
        ({"name": "B" * 999}, f'x.toml: lamp.name: must be letters from a to z, got "{"B" * 199}...'),
    ],
)
def test_what_cannot_be_is_one_line(table: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(**table)
    assert str(error.value).startswith(says) and "\n" not in str(error.value)


def test_a_table_must_be_one() -> None:
    with pytest.raises(ConfigError, match=r"x.toml: lamp: must be a table, written as \[lamp\]"):
        section(Lamp, [], "x.toml", "lamp")


@dataclass(frozen=True)
class Shelf:
    at: str = path("", "a folder")


@pytest.mark.parametrize("value", ["", "~", "~/a b", "ipc://~/socket", "a/~", "/x/~y", "ipc:///x"])
def test_a_tilde_at_the_beginning_of_a_path_is_the_home_folder(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("HOME", "/home/of me")
    made = section(Shelf, {"at": value}, "x.toml", "shelf").at
    whole = value.startswith(("a", "/")) or "///" in value
    assert made == (value if whole else value.replace("~", "/home/of me"))


@pytest.mark.parametrize("value", ["~no-such-user/x", "ipc://~no-such-user", "~no-such-user"])
def test_a_home_folder_that_nobody_knows_is_one_line(value: str) -> None:
    with pytest.raises(ConfigError) as error:
        section(Shelf, {"at": value}, "x.toml", "shelf")
    says = "x.toml: shelf.at: the home folder of ~no-such-user is not known: write the whole path, got"
    assert str(error.value) == f'{says} "{value}"'
    with pytest.raises(ConfigError, match="must be a folder"):
        section(Shelf, {"at": "a\0b"}, "x.toml", "shelf")
