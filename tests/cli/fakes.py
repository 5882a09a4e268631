"""What a fake broker answers, and the command line in a process of its own."""

import os
import pty
import subprocess
import sys
import termios


def refuse(message):
    key = message.get("key") or message.get("rid")
    return [{"type": "refused", "key": key, "reason": "the prompt is empty", "retry_after_s": None}]


def start(*arguments, **settings):
    code = "from tetri.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        **{"bufsize": 0, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **settings},
    )


def environment(**settings):
    """The environment with these settings, and no other locale or option of Python."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LC_", "LANG"))}
    return {**mine, **settings}


def on_terminal(*arguments, typed=b"", **settings):
    """Run the command line on a terminal of its own: (exit status, what the terminal got)."""
    ours, theirs = pty.openpty()
    with open(ours, "r+b", buffering=0) as ours:
        attributes = termios.tcgetattr(theirs)
        attributes[3] &= ~termios.ECHO
        termios.tcsetattr(theirs, termios.TCSANOW, attributes)
        ours.write(typed)
        process = start(*arguments, stdin=theirs, stdout=theirs, stderr=theirs, env=environment(**settings))
        os.close(theirs)
        got = b""
        try:
            while data := ours.read(4096):
                got += data
        except OSError:  # EIO: the process has ended
            pass
        return process.wait(60), got.replace(b"\r\n", b"\n")
