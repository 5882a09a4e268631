"""Texts in a live broker: long ones hold up no stream, and a broken chat template refuses messages alone."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from checkpoints import make_checkpoint
from live import LiveCluster, wait_until
from played_tokenizer import command, tokenised
from raw_client import RawClient

from tetri.client import RequestRefused
from tetri.engine.emulated import reference
from tetri.request import Sampling

COUNT, SIZE = 20, 512 << 10  # as long as the checks let pass with a context of 8192


def test_streams_go_on_while_long_texts_are_tokenised_and_they_are_answered_later(tmp_path: Path) -> None:
    """The tokenising process is stuck in the first text, so nothing here depends on how fast the machine is."""
    os.mkfifo(tmp_path / "go")
    stuck = f"from tetri.proc import broker; broker.command = lambda config: {command(tmp_path)!r}; "
    with LiveCluster(prologue=stuck) as cluster, RawClient(cluster.config.clients_address) as flood:
        flood.send("submit", key="first", secret=flood.secret, prompt="wait")
        wait_until(lambda: tokenised(tmp_path) == ["wait"], "it does not begin")
        for number in range(COUNT):
            flood.send("submit", key=f"{number}", secret=flood.secret, prompt="ab " * (SIZE // 3))
        made, prompt = cluster.config.emulated, [7, 8, 9]
        for _ in range(3):
            result = cluster.client().generate(prompt, max_tokens=100)
            assert result.token_ids == reference(prompt, Sampling(max_tokens=100), made.vocabulary, made.token_bytes)
        assert cluster.client().status()["counters"]["texts_tokenized"] == 0
        (tmp_path / "go").write_bytes(b"")
        assert flood.receive(key="first")["type"] == "accepted"
        why = f"the prompt has {SIZE // 3 * 3} tokens, the model's context holds 8192: shorten the prompt"
        assert [flood.receive(key=f"{number}")["reason"] for number in range(COUNT)] == [why] * COUNT
        assert cluster.client().status()["counters"]["texts_tokenized"] == COUNT + 1


def test_a_chat_template_that_cannot_be_used_is_degraded_and_refuses_messages_alone(tmp_path: Path) -> None:
    folder = str(make_checkpoint(tmp_path / "m", chat_template="{% wrong %}"))
    tokenizing = [sys.executable, "-m", "tetri.proc.tokenizer", "{}", folder, ""]
    model = f"from tetri.proc import broker, build; broker.command = lambda config: {tokenizing}; "
    model += f"build.tokenizer = lambda config, load=build.load_tokenizer: load({folder!r}); "
    with LiveCluster(prologue=model) as cluster:
        client = cluster.client()
        why = f"the chat template cannot be used: {folder}/tokenizer_config.json: line 1: Encountered unknown tag"
        with pytest.raises(RequestRefused) as refused:
            client.generate(messages=[{"role": "user", "content": "hi"}], max_tokens=2)
        assert str(refused.value).startswith(why) and str(refused.value).endswith(": send a prompt instead of messages")
        assert client.generate("the cat", max_tokens=2).usage.prompt_tokens == 2
        (note,) = [note for note in client.status()["notes"] if "messages" in note]
        assert note.startswith(f"messages are refused: {why}") and note in cluster.log("broker")
