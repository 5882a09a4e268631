"""The wire protocol: messages as typed records, and their encoding. docs/protocol.md describes the same in prose."""
