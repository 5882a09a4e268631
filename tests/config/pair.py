"""The least configuration that can be loaded, and those that cannot."""

import pytest

from tetri.config import ConfigError, load

PAIR = '[[worker]]\niid="p0"\nrole="prefill"\n[[worker]]\niid="d0"\nrole="decode"\n'


def bad(path, text):
    """Why that configuration cannot be loaded, in one line."""
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(path))
    return message
