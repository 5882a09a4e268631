import pytest

from tests.kv.nixl.world import NixlWorld, Owner


@pytest.fixture
def world(request, monkeypatch, tmp_path):
    """Indirectly: over which of UCX's transports; all, unless it is said."""
    if hasattr(request, "param"):
        monkeypatch.setenv("UCX_TLS", request.param)
    world = NixlWorld(tmp_path)
    yield world
    world.close()


@pytest.fixture
def owners():
    """Makes owners, and ends them."""
    made = []
    yield lambda *arguments: made.append(Owner(*arguments)) or made[-1]
    for owner in made:
        owner.kill()
