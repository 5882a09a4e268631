"""Taking from a mapping into the worker's own memory."""

import pytest
import xxhash

from tests.kv.contract_slab import nothing
from tests.kv.mapped import put
from tests.kv.parties import BLOCK, SLOTS, block
from tetri.kv import staging
from tetri.kv.base import KVError, KVLost
from tetri.kv.staging import Staging


def test_a_slot_reused_during_the_copy_is_lost_not_corrupt(slab, monkeypatch):
    handle, digest = slab.put(2, nothing)

    def reuse():
        """Before the first block is copied the sender gives the slots to another chunk."""
        monkeypatch.undo()
        slab.free(handle)
        slab.put(2, lambda views: views[1].__setitem__(0, 7))
        return xxhash.xxh3_64()

    monkeypatch.setattr(staging, "xxh3_64", reuse)
    with pytest.raises(KVLost, match="generation 2, not 1"):
        Staging(0).fetch(slab.segment, handle, digest)


def test_a_chunk_larger_than_any_before_grows_the_staging_and_a_wrong_digest_is_named(slab):
    buffer = Staging(BLOCK)
    for count in (1, SLOTS, 2):
        blocks = [block(number) for number in range(count)]
        handle, digest = put(slab, *blocks)
        assert [bytes(view) for view in buffer.fetch(slab.segment, handle, digest)] == blocks
        slab.free(handle)
    handle, digest = slab.put(1, nothing)
    with pytest.raises(KVLost, match="of memory for KV that arrives"):
        staging.populated(1 << 62)
    with pytest.raises(KVError, match=f"{digest:016x}, announced {digest ^ 1:016x}"):
        Staging(0).fetch(slab.segment, handle, digest ^ 1)
