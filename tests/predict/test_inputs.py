"""From a prompt's token ids back to the user's own text."""

import pytest

from tetri import models
from tetri.predict.inputs import END_TOKENS, reader, template_of
from tetri.request import Turn
from tetri.text import ByteTokenizer, TextError, load_tokenizer

TEXTS = ["Why is the sky blue?", "\n\nOne\n\nTwo \n", "naïve 日本 🙂", "assistant", "a"]


class Templated(ByteTokenizer):
    """A chat template with a system prompt in front."""

    def chat(self, turns):
        return self.encode("system\nBe kind.\n" + "".join(f"{t.role}\n{t.content}\n" for t in turns) + "assistant\n")


class Untemplated(ByteTokenizer):
    def chat(self, turns):
        raise TextError("the model has no chat template: send a prompt instead of messages")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", [ByteTokenizer, Templated])
def test_the_users_text_without_the_template(kind, text):
    tokenizer = kind()
    read = reader(tokenizer)
    assert read(tokenizer.chat([Turn(role="user", content=text)])) == text
    assert read(tokenizer.encode(text)) == text, "a prompt without the template"


def test_of_a_conversation_all_but_the_shared_template_is_left_and_of_a_very_long_prompt_the_ends():
    assert template_of(Templated()) == ("system\nBe kind.\nuser\n", "\nassistant\n")
    assert template_of(Untemplated()) == ("", "")
    assert reader(Untemplated())([104, 105]) == "hi"
    tokenizer = Templated()
    turns = [Turn(role="user", content="one"), Turn(role="assistant", content="two"), Turn(role="user", content="six")]
    assert reader(tokenizer)(tokenizer.chat(turns)) == "one\nassistant\ntwo\nuser\nsix"
    own = [Turn(role="system", content="Be brief."), *turns[:1]]
    assert reader(ByteTokenizer())(ByteTokenizer().chat(own)) == "system: Be brief.\nuser: one"
    ids = [*b"a" * 5000, *b"b" * 5000]
    assert reader(ByteTokenizer())(ids) == "a" * END_TOKENS + "b" * END_TOKENS


@pytest.mark.model
@pytest.mark.parametrize("text", TEXTS)
def test_of_the_real_model(text):
    tokenizer = load_tokenizer(models.find("smollm2-135m"))
    read = reader(tokenizer)
    ids = tokenizer.chat([Turn(role="user", content=text)])
    assert len(ids) > len(tokenizer.encode(text)) + 10
    assert read(ids) == text
