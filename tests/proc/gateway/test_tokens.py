"""Tokenising for a gateway: in a process of its own, which may die."""

import asyncio
import logging
import os
from contextlib import closing

import played_tokenizer
import pytest

from tetri.proc.gateway.tokens import MOST_WAITING, Tokens, bare, token_text
from tetri.request import Turn
from tetri.text import ByteTokenizer
from tetri.wire.openai import ApiError

LOG = logging.getLogger("gateway")


@pytest.fixture
def tokens(tmp_path):
    with closing(Tokens(played_tokenizer.command(tmp_path), LOG)) as tokens:
        yield tokens


def test_a_text_and_a_conversation_are_tokenised(tokens):
    async def asked():
        return await asyncio.gather(tokens.ids("Hi", None), tokens.ids(None, [Turn(role="user", content="x")]))

    text, chat = asyncio.run(asked())
    assert text == [72, 105] and bytes(chat) == b"user: x\nassistant: "


def test_a_text_that_cannot_be_tokenised_is_refused(tokens, caplog):
    with pytest.raises(ApiError, match="this text is wrong") as refused:
        asyncio.run(tokens.ids("wrong", None))
    assert refused.value.status == 400 and caplog.text == ""


def test_a_process_that_dies_is_started_again(tokens, tmp_path, caplog):
    with pytest.raises(ApiError, match="try later") as refused:
        asyncio.run(tokens.ids("die", None))
    assert refused.value.status == 503 and "the tokenising process died" in caplog.text
    assert asyncio.run(tokens.ids("Hi", None)) == [72, 105]
    assert played_tokenizer.tokenised(tmp_path) == ["die", "Hi"]


def test_only_so_many_texts_wait_and_the_end_does_not_wait_for_them(tmp_path, caplog):
    os.mkfifo(tmp_path / "go")

    async def asked():
        waiting = [asyncio.ensure_future(tokens.ids("wait", None)) for _ in range(MOST_WAITING)]
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="too many texts") as refused:
            await tokens.ids("Hi", None)
        assert refused.value.status == 503
        while not played_tokenizer.tokenised(tmp_path):
            await asyncio.sleep(0.005)
        for each in waiting:
            each.cancel()
        await asyncio.wait(waiting)

    with closing(Tokens(played_tokenizer.command(tmp_path), LOG)) as tokens:
        asyncio.run(asked())
    assert caplog.text == "" and played_tokenizer.tokenised(tmp_path) == ["wait"]


@pytest.mark.parametrize(
    ("ids", "around", "found"),
    [
        ([5, 6], [], [5, 6]),
        ([1, 5, 6], [1], [5, 6]),
        ([5, 6, 2], [2], [5, 6]),
        ([1, 5, 2], [1, 2], [5]),
        ([1], [1], []),
        ([5], [1], [5]),
    ],
)
def test_what_a_model_expects_around_a_prompt_can_be_left_out(ids, around, found):
    assert bare(ids, around) == found


def test_a_special_token_has_its_name():
    class Tokenizer(ByteTokenizer):
        specials = {"<end>": 7}

    text = token_text(Tokenizer())
    assert (text(7), text(72)) == (b"<end>", b"H")
