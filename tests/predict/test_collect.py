"""Collecting with a played writer: what is in the files, whatever happens on the way."""

import json
import resource
from functools import partial
from unittest.mock import Mock

import pytest
from played_writer import PlayedWriter

from tetri.predict import collect as of_texts
from tetri.predict.collect import Collected, CollectPlan, TextTask, fitting, plan_path, read_plan, tasks_of
from tetri.predict.lengths import PredictError, Prompt, read_lengths, read_states, states_path
from tetri.text import ByteTokenizer, TextError

PLAN = CollectPlan("tiny", "w", max_tokens=40, every=8, layers=(1, 2, 3))
PROMPTS = [Prompt(f"number {i}", "s", i + 1) for i in range(20)]
CHAT = ByteTokenizer().chat


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.jsonl"


def run(out, plan=PLAN, prompts=PROMPTS, samples=1, writer=None, batch=4, progress=lambda made: None):
    """How many texts were still to be written."""
    with Collected(out, plan) as collected:
        tasks = tasks_of(prompts, samples, collected.done)
        writer = PlayedWriter(every=plan.every) if writer is None else writer
        of_texts.collect(tasks, plan, collected, writer, CHAT, batch, progress)
        return len(tasks)


def agree(out, every=PLAN.every):
    """Whether lengths and states tell the same; the lengths."""
    lengths, bad = read_lengths(out)
    states = read_states(states_path(out))
    assert bad == [] and {length.key for length in lengths} <= set(states)
    for length in lengths:
        found = states[length.key]
        assert found.outputs == tuple(range(0, length.tokens, every))
        assert abs(float(found.rows[0, 0, 0]) - length.tokens / 100) < 1e-3
    return lengths


def test_every_text_is_in_the_files_with_its_states_of_a_seed_that_prompt_and_sample_decide(out):
    described, writer = [], PlayedWriter()
    assert run(out, writer=writer, samples=2, progress=described.append) == 40
    lengths = agree(out)
    assert lengths == described and len({length.key for length in lengths}) == 40 and writer.most == 4
    assert len({length.tokens for length in lengths}) > 10
    first = next(length for length in lengths if length.prompt == "number 0")
    assert first.source == "s" and first.prompt_tokens == len(of_texts.ids_of(PROMPTS[0], CHAT))
    assert {length.ended for length in lengths if length.tokens == 40} <= {"length"}
    assert read_plan(out) == PLAN
    one, two = (of_texts.sampling_of(TextTask(PROMPTS[0], sample), PLAN) for sample in (0, 1))
    assert one.seed != two.seed and one == of_texts.sampling_of(TextTask(Prompt("number 0", "other"), 0), PLAN)
    assert of_texts.sampling_of(TextTask(PROMPTS[0], 0), CollectPlan("tiny", "w", seed=1)).seed != one.seed
    assert (one.temperature, one.max_tokens) == (0.7, 40) and 0 <= one.seed < 1 << 63


def test_first_samples_come_first_and_more_can_be_asked_for_later(out):
    assert run(out) == 20
    assert run(out) == 0
    assert run(out, samples=3, prompts=[*PROMPTS, Prompt("one more")]) == 43
    assert sorted(length.sample for length in agree(out)) == [0] * 21 + [1] * 21 + [2] * 21
    tasks = tasks_of(PROMPTS, 3, {("x", 0): agree(out)[0]})
    assert [task.sample for task in tasks] == [0] * 20 + [1] * 20 + [2] * 20


def test_a_run_stopped_at_any_step_is_taken_up_and_gives_the_same(out, tmp_path):
    whole = tmp_path / "whole.jsonl"
    run(whole)
    stops = 0
    while True:
        stops += 1
        writer = PlayedWriter(at_step=partial(_stop_at, 7))
        try:
            run(out, writer=writer, batch=20)
            break
        except KeyboardInterrupt:
            agree(out)
            run(out, prompts=PROMPTS[:stops])  # or the longest text would never end
    assert stops > 2 and run(out) == 0
    assert sorted(agree(out), key=str) == sorted(agree(whole), key=str)


def _stop_at(last, number):
    if number == last:
        raise KeyboardInterrupt


def test_cut_off_anywhere_both_files_are_taken_up(out):
    run(out, prompts=PROMPTS[:3])
    lengths, states = out.read_bytes(), states_path(out).read_bytes()
    last_line = lengths[:-1].rindex(b"\n") + 1
    for cut in range(last_line, len(lengths)):
        out.write_bytes(lengths[:cut])
        assert run(out, prompts=PROMPTS[:3]) == 1
        assert len(agree(out)) == 3
    for cut in range(0, len(states), 7):
        out.write_bytes(lengths)
        states_path(out).write_bytes(states[:cut])
        with Collected(out, PLAN) as collected:
            assert collected.again == len(tasks_of(PROMPTS[:3], 1, collected.done)) >= 1
        run(out, prompts=PROMPTS[:3])
        assert len(agree(out)) == 3


def test_what_a_power_failure_left_of_the_states_is_written_again(out):
    run(out)
    good = states_path(out).read_bytes()
    for damaged in (good + bytes(500), good[:300] + bytes(len(good) - 300), b""):
        states_path(out).write_bytes(damaged)
        run(out)
        assert len(agree(out)) == 20


def test_a_file_goes_on_only_as_it_was_begun(out):
    run(out)
    before = out.read_bytes(), states_path(out).read_bytes()
    other = {"weights w": {"weights": "v"}, "temperature 0.7": {"temperature": 1.0}, "layers 1,2,3": {"layers": ()}}
    other |= {"max_tokens 40, seed 0": {"max_tokens": 41, "seed": 3}}
    for says, change in {**other, "every 8": {"every": 9}, "dtype bfloat16": {"dtype": "float32"}}.items():
        with pytest.raises(PredictError, match=f"was begun with {says}: give the same, or another --out"):
            Collected(out, CollectPlan(**{**vars(PLAN), **change}))
        assert (out.read_bytes(), states_path(out).read_bytes()) == before
    run(out, CollectPlan(**{**vars(PLAN), "model": "another/path/to/it"}))


def test_settings_that_led_to_no_length_bind_nobody(out):
    with pytest.raises(KeyboardInterrupt):
        others = CollectPlan("tiny", "w", max_tokens=40, layers=(9,))
        run(out, others, writer=PlayedWriter(at_step=partial(_stop_at, 1)))
    assert run(out) == 20 and read_plan(out) == PLAN
    assert len(agree(out)) == 20


@pytest.mark.parametrize("suffix", ["", ".json", ".states"])
def test_a_file_of_somebody_else_is_left_alone(out, suffix):
    foreign = out.with_name(out.name + suffix)
    foreign.write_text('{"prompt": "mine"}\n')
    with pytest.raises(PredictError, match="is there and was not begun by collect: give another --out"):
        Collected(out, PLAN)
    assert foreign.read_text() == '{"prompt": "mine"}\n'
    with pytest.raises(PredictError, match="is no file"):
        Collected(out.parent, PLAN)


def test_a_second_collect_is_refused_until_the_first_ends(out):
    with Collected(out, PLAN), pytest.raises(PredictError, match="another collect is writing"):
        Collected(out, PLAN)
    with pytest.raises(PredictError, match="was begun"):
        run(out)
        Collected(out, CollectPlan("tiny", "v"))
    Collected(out, PLAN).close()  # a refusal holds nothing


@pytest.fixture
def small_disk():
    """Files grow no further than so many bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("full", ["out.jsonl", "out.jsonl.states"])
def test_a_full_disk_leaves_sound_files(out, small_disk, full):
    plan = CollectPlan("tiny", "w", max_tokens=40, every=2, layers=(1, 2, 3) if full.endswith("states") else ())
    run(out, plan)
    assert states_path(out).exists() == bool(plan.layers)
    size = out.with_name(full).stat().st_size  # the larger of the files that there are
    for path in out.parent.iterdir():
        path.unlink()
    small_disk(size * 3 // 5)
    with pytest.raises(OSError, match=f"File too large.*{full}'$"):
        run(out, plan)
    small_disk(resource.RLIM_INFINITY)
    assert 0 < run(out, plan) < 20
    assert len(agree(out, 2) if plan.layers else read_lengths(out)[0]) == 20


def test_a_plan_that_cannot_be_written_leaves_nothing_of_it(out, small_disk):
    small_disk(10)
    with pytest.raises(OSError, match="File too large"):
        run(out)
    assert sorted(path.name for path in out.parent.iterdir()) == [out.name, states_path(out).name]
    small_disk(resource.RLIM_INFINITY)
    assert run(out) == 20


def test_a_plan_that_cannot_be_read_is_none_but_one_of_before_there_were_dtypes_can(out):
    assert read_plan(out) is None
    for text in ("[]", "{}", "nonsense", '{"model": "m", "weights": "w", "layers": 3}', "[" * 9999):
        plan_path(out).write_text(text)
        assert read_plan(out) is None
    plan_path(out).unlink()
    run(out)
    row = json.loads(plan_path(out).read_text())
    del row["dtype"]
    plan_path(out).write_text(json.dumps(row))
    assert run(out) == 0


def test_prompts_that_a_model_does_not_take_are_named_by_line_and_a_model_that_cannot_chat_once():
    def chat(turns):
        if turns[0].content == "number 7":
            raise TextError("the chat template refuses this conversation: no sevens")
        return CHAT(turns)

    long = Prompt("long" * 9, "", 21)
    good, bad, longest = fitting([*PROMPTS, long], chat, 40)
    assert good == [prompt for prompt in PROMPTS if prompt.text != "number 7"]
    assert bad == [
        "line 8: the chat template refuses this conversation: no sevens",
        "line 21: 54 prompt tokens, the model's context leaves room for 40",
    ]
    assert longest == len(of_texts.ids_of(PROMPTS[-1], CHAT))
    assert [prompt.line for prompt in fitting(PROMPTS, chat, 40, 8)[0]] == [1, 2, 3, 4, 5, 6, 7, 9]
    error = TextError("the model has no chat template: send a prompt instead of messages")
    with pytest.raises(PredictError, match="cannot be collected from this model: the model has no chat template"):
        fitting(PROMPTS, Mock(side_effect=error), 40)
