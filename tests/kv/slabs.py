"""Blocks and handles for the tests of the stores."""

import msgspec

BLOCK = 100  # bytes


def writer(*blocks):
    def write(views):
        for view, block in zip(views, blocks, strict=True):
            view[:] = block

    return write


def block(number):
    return bytes([number]) * BLOCK


def replaced(handle, **fields):
    return msgspec.structs.replace(handle, **fields)
