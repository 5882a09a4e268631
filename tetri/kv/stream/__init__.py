"""The KV path `stream`: pieces of a slab over ZeroMQ and TCP, between hosts that share no memory."""
