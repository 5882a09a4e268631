"""What a fake broker answers, and the command line in a process of its own."""

import subprocess
import sys


def refuse(message):
    key = message.get("key") or message.get("rid")
    return [{"type": "refused", "key": key, "reason": "the prompt is empty", "retry_after_s": None}]


def start(*arguments, **settings):
    code = "from tetri.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        **{"bufsize": 0, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **settings},
    )
