"""Processes: a core, its sockets, and one short loop each."""
