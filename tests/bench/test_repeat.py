"""The count of answers that depend on their company, on the emulated engine: none does."""

import pytest

from tetri.bench import repeat
from tetri.bench.deployment import EMULATED, configured, own_folder


def test_prompts_are_different_texts_of_one_size():
    texts = repeat.prompts(20)
    assert len(set(texts)) == 20 and {len(text) for text in texts} == {repeat.CHARS}


@pytest.mark.parametrize(("count", "batch"), [(20, 16), (32, 16), (5, 16), (3, 2)])
def test_every_prompt_is_in_full_company(count, batch):
    groups = repeat.companies(count, batch)
    assert {number for group in groups for number in group} == set(range(count))
    assert {len(group) for group in groups} == {min(count, batch)}


def test_differences_have_the_first_token_that_differs():
    alone = [[1, 2, 3], [4, 5], [6]]
    assert repeat.differing(alone, [(0, [1, 2, 3]), (1, [4, 5]), (2, [6])]) == {}
    assert repeat.differing(alone, [(0, [1, 2, 9]), (0, [1, 8, 3]), (1, [4])]) == {0: 1, 1: 1}


def test_emulated_answers_do_not_differ():
    with own_folder("repeat") as folder:
        config = configured(EMULATED, folder, "repeat", [])
        made = repeat.measured(config, repeat.prompts(4), 3, 4, lambda line: None)
    assert made == {"prompts": 4, "differ": 0, "first_token": {}}
    assert "4" in repeat.shown({"float32": made})
