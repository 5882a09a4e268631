"""What is worth measuring, and that it fits."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tetri.instance import Capacity
from tetri.profile.scenes import DEEP, MARGIN, Scene, batches, brief, scenes, sizes
from tetri.request import blocks_for

CPU = Capacity(blocks=363, block_tokens=128, chunk_tokens=2048, max_batch=32, context=8192)
positive = st.integers(1, 3000)


def test_sizes_are_powers_of_two_and_finer_where_the_knee_may_be():
    assert sizes(16) == [1, 2, 4, 8, 16]
    assert sizes(100) == [1, 2, 4, 8, 16, 32, 64, 80, 96, 100]
    assert sizes(300)[-5:] == [160, 192, 224, 256, 300]
    assert sizes(512, quick=True) == [1, 4, 16, 64, 128, 256, 512]


def test_batches_end_with_the_largest():
    assert batches(CPU) == [1, 2, 4, 8, 16, 32]
    assert batches(CPU, quick=True) == [1, 4, 16, 32]
    assert batches(Capacity(9, 9, 5, 30, 81)) == [1, 2, 4, 5], "each request of the batch takes a token of the budget"


@pytest.mark.parametrize("quick", [False, True])
def test_every_kind_of_step_is_there_and_seen_by_the_fit_as_it_should(quick):
    made = scenes(CPU, quick)
    fitted = [scene for scene in made if not scene.held_out]
    assert len(made) == len(set(made)) and len(fitted) < len(made)
    assert all(len(scene.prompts) + min(len(scene.contexts), 1) == 1 for scene in fitted)
    assert any(scene.prompts[0] >= 3 * 2048 for scene in fitted if scene.prompts), "chunks that start deep"
    assert {len(scene.contexts) for scene in fitted if scene.contexts} == set(batches(CPU, quick))
    lengths = {scene.contexts[0] for scene in fitted if len(scene.contexts) == 4}
    assert max(lengths) >= 16 * min(lengths), "contexts of several lengths"
    held = [scene for scene in made if scene.held_out]
    assert any(len(scene.prompts) > 1 for scene in held), "several prompts in a chunk"
    assert any(scene.prompts and scene.contexts for scene in held), "prefill beside decode"
    assert any(len(set(scene.contexts)) > 1 for scene in held), "contexts of unequal length"
    alone = {scene.prompts[0] for scene in held if len(scene.prompts) == 1 and not scene.contexts}
    assert alone and alone.isdisjoint(scene.prompts[0] for scene in fitted if scene.prompts)


def test_a_brief_measurement_has_all_that_a_quick_fit_needs():
    made = brief(CPU)
    assert not any(scene.held_out for scene in made) and Scene((), (DEEP,)) in made
    assert {len(scene.contexts) for scene in made if scene.contexts} == {*batches(CPU, quick=True)}
    assert {*sizes(2048, quick=True)} < {sum(scene.prompts) for scene in made}


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("budget", [2, 3, 7, 48, 100, 500, 509, 768, 1000])
def test_the_last_chunk_of_a_long_prompt_is_of_a_size_that_begins_one_too(budget, quick):
    """Else the fit cannot use it. Here only one whole chunk and part of a second fit."""
    made = scenes(Capacity(200, 16, budget, 2, 2 * budget), quick)
    ends = [scene.prompts[0] - budget for scene in made if not scene.held_out and sum(scene.prompts) > budget]
    assert ends and all(end in sizes(budget, quick) for end in ends)


@settings(deadline=None, derandomize=True)
@given(st.builds(Capacity, blocks=positive, block_tokens=positive, chunk_tokens=positive, max_batch=positive,
                 context=st.integers(2, 9000)), st.booleans())  # fmt: skip
def test_nothing_is_asked_that_does_not_fit(capacity, quick):
    for scene in scenes(capacity, quick):
        assert isinstance(scene, Scene) and (scene.prompts or scene.contexts)
        assert min(scene.prompts + scene.contexts) > 0
        assert len(scene.contexts) <= min(capacity.max_batch, capacity.chunk_tokens)
        assert all(length < capacity.context for length in scene.prompts)
        assert all(length + MARGIN <= capacity.context for length in scene.contexts)
        lengths = [*scene.prompts, *(length + MARGIN for length in scene.contexts)]
        assert sum(blocks_for(length, capacity.block_tokens) for length in lengths) <= capacity.blocks
        if scene.prompts and scene.contexts:
            assert len(scene.contexts) < capacity.chunk_tokens
