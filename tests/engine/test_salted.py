"""A salted engine's tokens tell who wrote them."""

import pytest

from tests.engine.driving import adopt, prefill, prompt, run, stay
from tests.engine.test_emulated import VOCABULARY, emulated
from tetri.engine.emulated import reference
from tetri.engine.salted import attempts_of, salt_of, writers
from tetri.request import Sampling

NAMES = ("p0", "d0", "d1")
SAMPLING = Sampling(max_tokens=8, ignore_eos=True)


def engines():
    return {name: emulated(salt=lambda key, name=name: salt_of(name)) for name in NAMES}


def answers():
    """Of the prompt: what d0 and d1 each write after the first token, which p0 writes."""
    made = engines()
    copies, first = prefill(made["p0"], "r", prompt(5))
    for name in ("d0", "d1"):
        adopt(made[name], "r", prompt(5), copies, first.token)
    return {name: [first.token, *run(made[name], "r")[0]["r"]] for name in ("d0", "d1")}


def found(output):
    return writers(prompt(5), output, SAMPLING, VOCABULARY, 8, {name: salt_of(name) for name in NAMES})


def test_each_token_names_the_engine_that_wrote_it():
    for name, output in answers().items():
        assert len(output) == 8 and output != reference(prompt(5), SAMPLING, VOCABULARY, 8)
        names = found(output)
        assert "p0" in names[0] and all(name in each for each in names[1:]) and attempts_of(names) == 1


def test_an_engine_where_a_request_stays_wrote_all_of_it():
    engine = engines()["p0"]
    first = stay(engine, "p", "d", prompt(5))
    engine.admit("d", first.token)
    assert all("p0" in each for each in found([first.token, *run(engine, "d")[0]["d"]]))


def test_a_token_from_elsewhere_has_no_writer():
    of = answers()
    mixed = [*of["d0"][:3], *of["d1"][3:]]
    assert attempts_of(found(mixed)) is None


@pytest.mark.parametrize(
    "names, attempts",
    [
        ([], 0),
        (["p"], 1),
        (["p", "d", "d"], 1),
        (["p", "de", "d", "e"], 2),
        (["p", "d", "p", "d"], 2),
        (["p", "d", "d", "e", "d"], 2),
        (["p", "d", "e", "d", "e"], 3),
        (["m", "m", "m"], 1),
        (["p", "d", ""], None),
    ],
)
def test_the_least_number_of_attempts(names, attempts):
    assert attempts_of([set(each) for each in names]) == attempts
