"""Cores: every decision of a process, with no I/O. `handle(event, now)` and `tick(now)` return what to do,
`deadline()` says when to tick next, `check()` raises when an invariant is broken. Time and chance come in from
outside; the result of a slow action comes back as an event; nothing iterates over a set.
"""
