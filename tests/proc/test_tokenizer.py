"""The tokenising process: what it answers, and that it ends with whoever started it."""

from __future__ import annotations

import subprocess
import sys
from array import array
from collections.abc import Sequence
from multiprocessing import Pipe
from pathlib import Path
from threading import Thread

import msgspec
import pytest

from tetri.proc.texts import TokenizerProcess
from tetri.proc.tokenizer import Answer, Question, serve
from tetri.request import Turn
from tetri.text import ByteTokenizer, TextError


def ids(answer: bytes) -> list[int]:
    found = msgspec.msgpack.decode(answer, type=Answer)
    assert found.problem is None
    return array("I", found.ids).tolist()


def test_it_answers_until_the_connection_closes() -> None:
    ours, its = Pipe()
    thread = Thread(target=serve, args=(ByteTokenizer(), its))
    thread.start()
    assert ids(ours.recv_bytes()) == []  # it is ready
    for asked, text in (
        (Question("hé", None), "hé"),
        (Question("", None), ""),
        (Question(None, [Turn(role="user", content="a")]), "user: a\nassistant: "),
    ):
        ours.send_bytes(msgspec.msgpack.encode(asked))
        assert ids(ours.recv_bytes()) == list(text.encode())
    ours.close()
    thread.join(20)
    assert not thread.is_alive()
    its.close()


def test_what_cannot_be_tokenised_is_a_problem_and_it_goes_on() -> None:
    class Fussy(ByteTokenizer):
        def chat(self, turns: Sequence[Turn]) -> list[int]:
            raise TextError("no chat template")

    ours, its = Pipe()
    thread = Thread(target=serve, args=(Fussy(), its))
    thread.start()
    ours.recv_bytes()
    ours.send_bytes(msgspec.msgpack.encode(Question(None, [])))
    assert msgspec.msgpack.decode(ours.recv_bytes(), type=Answer) == Answer(b"", "no chat template")
    ours.send_bytes(msgspec.msgpack.encode(Question("a", None)))
    assert ids(ours.recv_bytes()) == [97]
    ours.close()
    thread.join(20)
    its.close()


def test_a_checkpoint_that_cannot_be_loaded_is_its_first_answer(tmp_path: Path) -> None:
    started = TokenizerProcess([sys.executable, "-m", "tetri.proc.tokenizer", "{}", str(tmp_path), "yes"])
    with pytest.raises(TextError, match="tokenizer.json: cannot be read"):
        started.loaded()
    started.close()


@pytest.mark.parametrize("number", ["KILL", "TERM"])
def test_it_ends_when_the_one_who_started_it_is_killed(number: str) -> None:
    """Its starter says its process id and is killed: the pipe that the process inherited as its output closes then."""
    starter = """
import os, signal, sys, time
from tetri.proc.texts import TokenizerProcess
started = TokenizerProcess([sys.executable, "-m", "tetri.proc.tokenizer", "{}", "", ""])
started.loaded()
print("loaded", flush=True)
os.kill(os.getpid(), signal.SIGNUMBER)
time.sleep(60)
"""
    program = starter.replace("SIGNUMBER", f"SIG{number}")
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, timeout=60, check=False)
    assert done.stdout == b"loaded\n"  # its end is read only after both have ended
