"""KV stores: where a chunk's blocks lie between the sender's engine and the receiver's."""
