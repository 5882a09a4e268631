import codecs
import json
import re
import time

import pytest
from checkpoints import make_checkpoint
from hypothesis import example, given
from hypothesis import strategies as st
from jinja2 import TemplateError
from tokenizers import Tokenizer

from tetri.request import Turn
from tetri.text import ByteTokenizer, ChatTemplate, Stopper, TextError, decode, load_tokenizer

BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def inner(folder):
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


# ------------------------------------------------------------------------------------------- tokenisers


def test_any_id_has_a_text_without_a_model():
    assert decode(BYTES, [72, 105, 0x1F3A, 70000]) == "Hi1f3a 11170 "


def test_chat_without_a_model():
    ids = BYTES.chat([Turn(role="user", content="hello")])
    assert decode(BYTES, ids) == "user: hello\nassistant: "


@given(st.lists(st.integers(0, 420), max_size=40))
def test_token_bytes_give_what_the_tokenizers_package_decodes(tokenizer, inner, ids):
    assert decode(tokenizer, ids) == inner.decode(ids, skip_special_tokens=True)


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@pytest.mark.parametrize("byte", [True, False], ids=["bytes", "a model's tokens"])
def test_a_text_comes_back(tokenizer, byte, text):
    if "<s>" not in text and "<e>" not in text:
        each = BYTES if byte else tokenizer
        assert decode(each, each.encode(text)) == text


def test_the_template_is_applied_and_specials_are_one_token(tokenizer, inner):
    turns = [Turn(role="user", content="hi")]
    ids = tokenizer.chat(turns)
    assert inner.decode(ids, skip_special_tokens=False) == "<s>user\nhi<e>\n<s>assistant\n"
    assert ids.count(0) == 2 and ids.count(1) == 1


def test_eos_ids_come_from_all_files(tokenizer):
    assert tokenizer.eos_ids == {0, 1}


LISTED = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]


@pytest.mark.parametrize(
    ("setting", "files", "rendered"),
    [
        ("setting", {"chat_template.jinja": "file:{{ bos_token }}"}, "file:"),
        ("setting", {"chat_template.json": '{"chat_template": "json"}'}, "setting"),
        (None, {"chat_template.json": '{"chat_template": "json"}'}, "json"),
        (LISTED, {}, "d"),
        ({"default": "d", "rag": "r"}, {}, "d"),
    ],
)
def test_where_the_chat_template_may_be(tmp_path, setting, files, rendered):
    found = load_tokenizer(written(tmp_path / "m", setting, files))
    assert decode(found, found.chat([])) == rendered and found.template_problem is None


def written(folder, setting, files):
    made = make_checkpoint(folder, chat_template=setting)
    for name, text in files.items():
        (made / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return made


@pytest.mark.parametrize(
    ("setting", "files", "why"),
    [
        ("{% for %}", {}, "tokenizer_config.json: line 1: Expected an expression"),
        ("a\n{% wrong %}", {}, "tokenizer_config.json: line 2: Encountered unknown tag 'wrong'"),
        ("{% break %}", {}, "tokenizer_config.json: 'break' outside loop"),
        ("x", {"chat_template.jinja": "{{ 'ü' }}".encode("latin-1")}, "chat_template.jinja: cannot be read: 'utf-8'"),
        (7, {}, "tokenizer_config.json: chat_template must be a text, not 7"),
        ([{"name": "default"}], {}, "tokenizer_config.json: chat_template must be a text, not null"),
        (LISTED[:1], {}, "tokenizer_config.json: none of its templates is called default: tools"),
        (None, {"chat_template.json": "["}, "chat_template.json: not JSON"),
    ],
)
def test_a_template_that_cannot_be_used_refuses_messages_alone(tmp_path, setting, files, why):
    found = load_tokenizer(written(tmp_path / "m", setting, files))
    assert decode(found, found.encode("the cat")) == "the cat"
    with pytest.raises(TextError) as caught:
        found.chat([Turn(role="user", content="x")])
    problem = found.template_problem
    assert problem.startswith(f"the chat template cannot be used: {tmp_path / 'm'}/") and why in problem
    assert str(caught.value) == f"{problem}: send a prompt instead of messages" and "\n" not in problem


TEMPLATES = [
    "{% for m in messages %}{% generation %}{{ m.content }}\n{% endgeneration %}{% endfor %}!",
    "{%- for m in messages -%}\n  {%- generation -%}  {{ m.content }}  {%- endgeneration %}\n{% endfor -%} !",
    "{% set x = 1 %}{% generation %}{% set x = 2 %}{% set y = 3 %}{{ x }}{% endgeneration %}{{ x }}{{ y }}",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}",
    "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ messages | tojson(true, none, (',', ':'), true) }}",
    "{{ strftime_now('%Y') }}{% set n = namespace(x=1) %}{% set n.x = 2 %}{{ n.x }}",
    "  {% if add_generation_prompt %}\n  a\n  {% endif %}\n{# #}  {{ bos_token }}{{ pad_token }}{{ sep_token }}",
    "{% if tools %}t{% endif %}{% if documents is none %}d{% endif %}{{ messages[1].content.split(' ')[1] }}",
    "{{ raise_exception('no') }}",
    "{{ messages.append(1) }}",
]


@pytest.mark.parametrize("source", TEMPLATES)
def test_templates_render_as_by_transformers(source):
    from transformers.utils.chat_template_utils import render_jinja_template as theirs

    named = {"bos_token": "<s>", "pad_token": "<p>"}
    messages = [{"role": "user", "content": "<a> & 'é'"}, {"role": "assistant", "content": "b c"}]

    def made(render):
        try:
            return render()
        except (TextError, TemplateError, SyntaxError):
            return "an error"

    right = made(lambda: theirs([messages], chat_template=source, add_generation_prompt=True, **named)[0][0])
    assert made(lambda: ChatTemplate(source, named).render(messages)) == right


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "refuses this conversation: roles must alternate"),
        ("{{ messages[0].content.nothing.here }}", "fails on this conversation"),
        ("{{ ''.__class__.__mro__ }}", "fails on this conversation"),
        ("{{ 1 // 0 }}", "fails on this conversation"),
        ("{{ messages[0].content.index('y') }}", "fails on this conversation: substring not found"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "fails on this conversation: maximum recursion depth"),
        (None, "the model has no chat template: send a prompt instead of messages"),
    ],
)
def test_templates_that_fail_are_one_line(tmp_path, template, says):
    broken = load_tokenizer(make_checkpoint(tmp_path / "m", chat_template=template))
    with pytest.raises(TextError, match=says) as caught:
        broken.chat([Turn(role="user", content="x")])
    assert "\n" not in str(caught.value)


def test_unusable_folders(tmp_path):
    with pytest.raises(TextError, match="cannot be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(TextError, match="cannot be used"):
        load_tokenizer(tmp_path)
    other = make_checkpoint(tmp_path / "o")
    (other / "tokenizer_config.json").write_text("[")
    with pytest.raises(TextError, match="not JSON"):
        load_tokenizer(other)
    stored = json.loads((other / "tokenizer.json").read_text())
    stored["decoder"] = {"type": "Fuse"}
    (other / "tokenizer.json").write_text(json.dumps(stored))
    with pytest.raises(TextError, match="decoder Fuse is not supported"):
        load_tokenizer(other)


def test_an_unknown_end_of_sequence(tmp_path):
    bare = make_checkpoint(tmp_path / "m", eos_token=None)
    (bare / "generation_config.json").unlink()
    with pytest.raises(TextError, match="end-of-sequence"):
        load_tokenizer(bare)


def test_half_a_surrogate_is_refused(tokenizer):
    for each in (tokenizer, BYTES):
        with pytest.raises(TextError, match="character 2"):
            each.encode("ab\ud800")


# ---------------------------------------------------------------------------------------------- Stopper


def naive(tokenizer, ids, stop, least=0):
    """The definition: whole text, first stop to be complete after `least` tokens, longest of those; and the tokens that
    count. Special tokens of a stop have a text here, which is not shown."""
    named = {text: i for text, i in tokenizer.specials.items() if any(text in each for each in stop)}
    spelled = [text for each in stop for text in {each, re.sub("<[se]>", lambda m: MARKS[m[0]], each)}]
    utf8, text, counts = codecs.getincrementaldecoder("utf-8")("replace"), "", []
    for count, token in enumerate([*ids, None], 1):
        mark = "".join(MARKS[name] for name, i in named.items() if i == token)
        bits = b"" if token is None else tokenizer.token_bytes(token)
        text += utf8.decode(bits, final=bool(mark) or token is None) + mark
        counts += [min(count, len(ids))] * (len(text) - len(counts))
    for end, count in enumerate(counts, 1):
        matched = [len(s) for s in spelled if text[:end].endswith(s)]
        if matched and count > least:
            return text[: end - max(matched)].translate(HIDDEN), True, count
    return text.translate(HIDDEN), False, len(ids)


def run(tokenizer, ids, stop, cuts=(), output=0, least=0):
    """All that a Stopper releases, fed in pieces; checks that what is shown never contains a stop."""
    stopper = Stopper(tokenizer, stop, ids[:output], least)
    earlier = Stopper(tokenizer, stop, min_tokens=least).feed(ids[:output]).text
    shown, start = earlier, output
    for cut in [*sorted(c for c in cuts if c > output), len(ids)]:
        shown += stopper.feed(ids[start:cut]).text
        start = max(start, cut)
        assert least or any("<" in s for s in stop) or not any(s in shown for s in stop)
    last = stopper.finish()
    return shown + last.text, last.stopped, last.counted


MARKS = {"<s>": "\ud800", "<e>": "\ud801"}
HIDDEN = dict.fromkeys(map(ord, MARKS.values()))
least = st.integers(0, 12)
outbox = st.text(st.sampled_from("ab\n"), min_size=1, max_size=5)
stops = st.lists(outbox, max_size=3)
cuts = st.lists(st.integers(0, 60), max_size=6)


@given(st.text(st.sampled_from("ab\n"), max_size=60), stops, cuts, st.integers(0, 20), least)
@example("aaab", ["aab"], [], 0, 0)
@example("ababac", ["abac"], [3], 0, 0)
@example("abcd", ["bcd", "c"], [], 0, 0)
@example("abab", ["ab"], [1], 0, 2)
@example("aab", ["ab", "a"], [], 0, 2)
def test_one_character_a_token(text, stop, cuts, output, least):
    ids = BYTES.encode(text)
    assert run(BYTES, ids, stop, cuts, min(output, len(ids)), least) == naive(BYTES, ids, stop, least)


words = st.lists(st.one_of(st.integers(0, 420), st.sampled_from([0, 1, 0xE6 + 2, 100, 130, 250])), max_size=40)
plain = st.text(st.sampled_from("the cat日é\ufffd"), min_size=1, max_size=4)
special = st.sampled_from(["<e>", "<s>", "t<e>", "<e><s>", "<s> "])


@given(words, st.lists(plain | special, max_size=3), cuts, least)
def test_tokens_of_a_model_stops_anywhere(tokenizer, ids, stop, cuts, least):
    assert run(tokenizer, ids, stop, cuts, least=least) == naive(tokenizer, ids, stop, least)


@pytest.mark.parametrize(
    ("stop", "least", "end", "text"),
    [
        (["<e>"], 0, 4, "the cat"),  # by id
        (["cat<e>"], 0, 4, "the "),  # with text before it
        (["<e> sat"], 0, 5, "the cat"),  # with text after it
        (["<e>"], 4, None, "the cat sat"),
        (["<s>"], 0, 1, ""),
        (["cat"], 3, None, "the cat sat"),  # complete within the first three tokens
        (["cat sat"], 4, 5, "the "),  # begun within them
        (["<e>", " cat"], 0, 3, "the"),
    ],
)
def test_a_stop_text_may_name_special_tokens_and_counts_after_min_tokens(tokenizer, stop, least, end, text):
    ids = [0, *tokenizer.encode("the"), *tokenizer.encode(" cat"), 1, *tokenizer.encode(" sat")]
    assert len(ids) == 5
    for cuts in ((), range(6)):
        assert run(tokenizer, ids, stop, cuts, least=least) == (text, end is not None, end or 5)


def test_a_token_that_ends_the_output_has_no_text():
    ends = Stopper(BYTES, ["ac"], silent=[98])
    assert ends.advance([*b"xa"], False) == ("x", None) and ends.advance([*b"b"], True) == ("a", None)
    assert Stopper(BYTES).advance([*b"ab"], True) == ("ab", None)


def test_a_special_token_that_is_spelled_out_stops_too(tokenizer):
    ids = [i for char in "so <e>" for i in tokenizer.encode(char)]
    assert 1 not in ids and run(tokenizer, ids, ["<e>"]) == ("so ", True, 6)


@given(st.text(st.characters(exclude_categories=["Cs"])), cuts)
def test_half_a_character_is_never_shown(text, cuts):
    stopper = Stopper(BYTES)
    shown = ""
    for byte in text.encode():
        shown += stopper.feed([byte]).text
        assert text.startswith(shown)
    assert shown + stopper.finish().text == text


@pytest.mark.parametrize(
    ("stop", "output", "fed", "released"),
    [
        (["f3"], b"", ([104, 0x1F3A, 0x2222], [65]), [("h1", True, 2), ("", True, 2), ("", True, 2)]),
        (["3a", "f"], b"", ([104, 0x1F3A],), [("h1", True, 2), ("", True, 2)]),
        (["END"], b"", (b"xEN", b"E"), [("x", False, 3), ("EN", False, 4), ("E", False, 4)]),
        (["END"], b"abE", (b"ND!",), [("", True, 5), ("", True, 5)]),
        (["b"], b"abc", (), [("", True, 2)]),
    ],
    ids=[
        "a stop in a token spares its beginning",
        "the first of two",
        "held and released",
        "after earlier output",
        "in earlier output",
    ],
)
def test_what_is_released(stop, output, fed, released):
    stopper = Stopper(BYTES, stop, output)
    assert [*map(stopper.feed, fed), stopper.finish()] == released


def test_a_token_costs_the_same_in_a_long_text():
    def cost(times):
        """Seconds a token."""
        ids = BYTES.encode("the quick brown fox says a a a and jumps </ over\n it. " * times)
        stopper = Stopper(BYTES, ["\n\n", "</s>", "User:", "a" * 256])
        begin = time.process_time()
        for token in ids:
            stopper.feed((token,))
        return (time.process_time() - begin) / len(ids)

    assert min(cost(800) for _ in range(3)) < 5 * min(cost(40) for _ in range(3))


def test_a_step_of_the_output_gives_its_text_and_where_a_stop_text_ends_it():
    going, stopping = Stopper(ByteTokenizer(), ["lo"]), Stopper(ByteTokenizer(), ["lo"])
    assert [going.advance(b"hel", False), going.advance(b"", True)] == [("he", None), ("l", None)]
    assert [stopping.advance(b"hel", False), stopping.advance(b"lo!", True)] == [("he", None), ("l", 5)]
