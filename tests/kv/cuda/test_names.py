"""The stand-in has CuPy's own names, arguments and constants. Needs CuPy, but no GPU."""

import inspect
import re

import pytest

from tests.kv.cuda.stand_in import CUDARuntimeError, Runtime, StandIn
from tetri.kv.cuda.runtime import Device

cupy = pytest.importorskip("cupy", reason="CuPy is not installed: pip install 'tetri[cuda]'")
METHODS = [name for name, value in vars(Runtime).items() if inspect.isfunction(value)]
CALLS = [name for name in METHODS if re.match("[a-z]+[A-Z]|free$|malloc$", name)]
CONSTANTS = [name for name, value in vars(Runtime).items() if isinstance(value, int)]


@pytest.mark.parametrize("name", CALLS)
def test_calls_take_what_cupys_take(name):
    """CuPy's docstrings begin with the signature, as `name(type argument, type argument=default)`."""
    told = re.match(rf"{name}\((.*?)\)( ->|$|\n)", getattr(cupy.cuda.runtime, name).__doc__)
    theirs = [part.partition("=")[0].split()[-1] for part in told[1].split(",") if part.strip()]
    needed = [part for part in told[1].split(",") if part.strip() and "=" not in part]
    ours = list(inspect.signature(getattr(Runtime, name)).parameters.values())[1:]
    assert len(ours) == len(theirs)
    assert len([each for each in ours if each.default is inspect.Parameter.empty]) == len(needed)


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_are_cupys(name):
    assert getattr(Runtime, name) == getattr(cupy.cuda.runtime, name)


def test_errors_are_made_and_caught_alike():
    assert issubclass(cupy.cuda.runtime.CUDARuntimeError, RuntimeError)
    assert cupy.cuda.runtime.CUDARuntimeError(600).status == CUDARuntimeError(600).status == 600
    assert "NotReady" in str(cupy.cuda.runtime.CUDARuntimeError(600))
    for name in ("asarray", "asnumpy", "empty", "from_dlpack", "uint8"):
        assert hasattr(cupy, name)
    assert callable(cupy.cuda.Stream.from_external)


def test_memory_that_cupy_does_not_own_becomes_an_array(tmp_path):
    """No byte of it is touched, so this needs no GPU; the pointer is none."""
    device = Device(StandIn(tmp_path))
    device.cupy = cupy
    array = device.array(4096, 100)
    assert (array.shape, array.dtype, array.data.ptr, array[7:].data.ptr) == ((100,), "uint8", 4096, 4103)
