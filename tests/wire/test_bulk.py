from tetri.wire import codec
from tetri.wire.bulk import MAX_SLOTS, BulkReply, BulkRequest, Fetch, Gone
from tetri.wire.handover import Handle


def test_the_longest_messages_are_within_their_limits():
    handle = Handle(segment="x" * 128, slots=[1 << 62] * MAX_SLOTS, generations=[1 << 62] * MAX_SLOTS, block_bytes=1)
    fetch = Fetch(number=1 << 62, lane=1 << 62, handle=handle, start=1 << 62, credit=1 << 62)
    assert codec.decode(codec.encode(fetch), BulkRequest) == fetch
    gone = Gone(number=1 << 62, foreign=True, reason="\U0001f600" * 300)
    assert codec.decode(codec.encode(gone), BulkReply) == gone
