import pytest

from tetri.sim.kernel import Kernel


@pytest.fixture
def kernel():
    return Kernel()
