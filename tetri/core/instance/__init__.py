"""State of a worker that both phases share: its identity, its peers and the ledger of KV blocks."""
