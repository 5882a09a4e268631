"""What crosses the wire: messages as typed records, and their bytes. docs/protocol.md is the same in prose."""
