"""How a step is divided for attention, and that one word of each cache line is read."""

import pytest
import torch

from tetri.engine.vllm.read_ahead import grouped, line_starts


@pytest.mark.parametrize(
    ("full", "ranges"),
    [
        ([4, 4, 4], [(0, 2), (2, 3)]),
        ([9, 9], [(0, 1), (1, 2)]),  # more than fits: alone
        ([0, 0, 8, 0], [(0, 4)]),  # requests without a full block cost nothing
        ([8, 1, 7], [(0, 1), (1, 3)]),
    ],
)
def test_a_part_has_as_many_decode_requests_as_their_full_blocks_fit(full, ranges):
    assert grouped([True] * len(full), full, 8) == ranges


def test_prefill_and_decode_requests_are_in_different_parts():
    assert grouped([True, True, False, False, True], [1, 1, 0, 0, 1], 8) == [(0, 2), (2, 4), (4, 5)]


def test_the_first_word_of_each_cache_line_is_a_view_of_the_blocks():
    cache = torch.zeros((3, 2, 32, 64), dtype=torch.bfloat16)  # 8 KiB a block
    lines = line_starts(cache)
    assert lines.shape == (3, 128)
    cache.view(3, -1)[1, 32:34] = 1.0  # the second line of block 1
    assert lines.nonzero().tolist() == [[1, 1]]
