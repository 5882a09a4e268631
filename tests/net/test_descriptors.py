"""The limit of open files."""

import resource

from tetri.net import descriptors


def test_the_limit_is_raised_as_far_as_allowed_and_what_is_open_counts():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors.used() + descriptors.RESERVE + 8, hard))
        assert descriptors.left() == 8
        with open("/dev/null"):
            assert descriptors.left() == 7
        assert descriptors.raise_limit() == descriptors.limit() == descriptors.hard_limit()
        assert descriptors.left() > 8
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
