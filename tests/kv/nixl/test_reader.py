"""The contract of the KV paths, over nixl. All stores are in one process; test_mover.py has several."""

from tests.kv.contract import StoreContract
from tests.kv.nixl.world import NixlWorld


class TestNixl(StoreContract):
    World = NixlWorld
