"""Files of prompts, lengths and hidden states, sound and broken."""

import json

import numpy as np
import pytest

from tetri.predict import lengths as files
from tetri.predict.lengths import Length, PredictError, Prompt, States, pack_states, read_lengths, read_prompts


@pytest.fixture
def file(tmp_path):
    def write(*lines):
        path = tmp_path / "file.jsonl"
        path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines))
        return path

    return write


def test_each_prompt_is_read_once_with_its_source_and_line_unless_there_is_no_file(file, tmp_path):
    path = file({"prompt": "a", "source": "x", "more": 1}, b"", {"prompt": "b"}, {"prompt": "a", "source": "y"})
    assert read_prompts(path) == ([Prompt("a", "x", 1), Prompt("b", "", 3)], [])
    for read in (read_prompts, read_lengths, files.read_states):
        with pytest.raises(PredictError, match="nowhere: No such file"):
            read(tmp_path / "nowhere")
        with pytest.raises(PredictError, match="directory"):
            read(tmp_path)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        *((line, "not JSON") for line in (b"nonsense", b'{"prompt": "cut off', b'{"prompt": "\xff"}', b"[" * 100_000)),
        (["prompt"], "not an object"),
        *((line, 'it needs a text "prompt"') for line in ({"text": "a"}, {"prompt": 3}, {"prompt": " \n"})),
        ({"prompt": "a" * (files.MOST_PROMPT_CHARS + 1)}, "1048577 characters"),
        ({"prompt": "\ud800"}, "half a surrogate pair"),
    ],
)
def test_a_bad_prompt_is_named_by_its_line_and_the_others_are_read(file, line, says):
    path = file({"prompt": "a"}, line, {"prompt": "b", "source": "\udc00"})
    prompts, bad = read_prompts(path)
    assert [prompt.text for prompt in prompts] == ["a", "b"] and prompts[1].source == ""
    assert len(bad) == 1 and bad[0].startswith(f"{path}:2: ") and says in bad[0]


def test_lengths_by_sample_the_later_line_counts(file):
    first = {"prompt": "a", "tokens": 3, "sample": 0}
    path = file(first, {**first, "tokens": 4, "ended": "length"}, {**first, "sample": 1, "prompt_tokens": 9})
    assert read_lengths(path) == ([Length("a", 4, 0, "length"), Length("a", 3, 1, prompt_tokens=9)], [])
    path = file({"prompt": "a", "tokens": 3}, {"prompt": "b", "tokens": 4}, {"prompt": "a", "tokens": 5})
    assert read_lengths(path)[0] == [Length("a", 3, 0), Length("b", 4, 0), Length("a", 5, 1)]


WRONG = [*({"tokens": tokens} for tokens in (-1, 1.5, True, "3")), *({"prompt": prompt} for prompt in (None, "\ud800"))]


@pytest.mark.parametrize("wrong", [*WRONG, {"sample": -1}, {"ended": "early"}, {"source": 3}])
def test_a_bad_length_is_named_by_its_line(file, wrong):
    path = file({"prompt": "a", "tokens": 1}, {"prompt": "b", "tokens": 2, **wrong}, {"prompt": "c"})
    lengths, bad = read_lengths(path)
    assert lengths == [Length("a", 1)]
    needed = "an object with a text `prompt` and a number `tokens` is needed"
    assert bad == [f"{path}:{number}: {needed}" for number in (2, 3)]


def made(text, sample=0, rows=2, start=0.0):
    states = np.arange(rows * 6, dtype="f4").reshape(rows, 2, 3) + start
    return States((files.prompt_key(text), sample), tuple(range(0, 8 * rows, 8)), states)


def test_states_there_and_back_the_later_record_counts(tmp_path):
    path = files.states_path(tmp_path / "x.jsonl")
    assert path.name == "x.jsonl.states"
    wanted = [made("a"), made("a", 1, 3), made("b"), made("a", 0, 5, start=100.0)]
    path.write_bytes(b"".join(map(pack_states, wanted)))
    read = files.read_states(path)
    assert list(read) == [wanted[0].key, wanted[1].key, wanted[2].key]
    for states in wanted[1:]:
        found = read[states.key]
        assert (found.key, found.outputs) == (states.key, states.outputs) and (found.rows == states.rows).all()
    assert read[wanted[0].key].rows.dtype == np.float16
    # Beyond half precision they are bounded, not infinite.
    large = States(("a", 0), (0,), np.array([[[1e6, -1e6, 1.0]]], "f4"))
    path.write_bytes(pack_states(large))
    assert files.read_states(path)["a", 0].rows.tolist() == [[[files.LARGEST_STATE, -files.LARGEST_STATE, 1.0]]]


def test_a_record_cut_off_anywhere_is_left_out_and_what_is_none_is_an_error(tmp_path):
    first, second = pack_states(made("a")), pack_states(made("b"))
    path = tmp_path / "s"
    for length in range(len(second)):
        path.write_bytes(first + second[:length])
        assert [end for _, end in files.records(path)] == [len(first)]
    for garbage in (b"\0" * 9, b"\xc1", b"\x93\x01\x02\x03", b"prompt"):
        path.write_bytes(first + garbage)
        with pytest.raises(PredictError, match="not a file of hidden states .*: collect again"):
            files.read_states(path)
