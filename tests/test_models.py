"""The way from a model's name to a complete checkpoint folder, with the conversion itself stubbed."""

import fcntl
import getpass
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from tetri import models

NAME = "smollm2-135m"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TETRI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_checkpoint(package, target: Path) -> None:
    for name in ("config.json", *models.TOKENIZER_FILES):
        (target / name).write_text("{}")
    (target / "model.safetensors").write_bytes(b"weights")


@pytest.fixture
def conversions(monkeypatch):
    """Counts the conversions, which write a tiny stand-in for a checkpoint."""
    made = []

    def convert(package, target):
        write_checkpoint(package, target)
        made.append(target)

    monkeypatch.setattr(models, "_convert", convert)
    return made


def error_of(call, *arguments) -> str:
    with pytest.raises(models.ModelError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_fetch_makes_one_complete_folder_and_keeps_it(cache, conversions):
    folder = models.fetch(NAME)
    assert models.fetch(NAME) == folder == models.find(NAME)
    assert len(conversions) == 1
    assert [path.name for path in folder.parent.iterdir() if not path.name.endswith(".lock")] == [folder.name]


def test_a_killed_run_leaves_nothing_that_is_taken_for_a_model(cache, conversions):
    folder = cache / "models" / f"{NAME}-r1"
    killed = folder.parent / f".{folder.name}.part"
    killed.mkdir(parents=True)
    (killed / "config.json").write_text("{")
    assert "tetri-cli model fetch" in error_of(models.find, NAME)
    assert models.fetch(NAME) == folder
    assert not killed.exists()


def test_an_incomplete_folder_is_made_again(cache, conversions):
    folder = models.fetch(NAME)
    (folder / "tokenizer.json").unlink()
    models.fetch(NAME)
    assert len(conversions) == 2
    assert (folder / "tokenizer.json").exists()


def test_a_failed_conversion_leaves_nothing_behind(cache, monkeypatch):
    def fail(package, target):
        (target / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(models, "_convert", fail)
    message = error_of(models.fetch, NAME)
    assert "No space left" in message and "TETRI_CACHE" in message
    assert [path.suffix for path in (cache / "models").iterdir()] == [".lock"]


def test_a_second_run_waits_for_the_first_and_uses_its_result(cache):
    folder = cache / "models" / f"{NAME}-r1"
    folder.parent.mkdir(parents=True)
    with open(folder.parent / f".{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [sys.executable, "-m", "tetri.models", NAME]
        second = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(0.5)
        folder.mkdir()
        write_checkpoint(None, folder)
        (folder / models.HASH_FILE).write_text("x")
    output, errors = second.communicate(timeout=30)
    assert second.returncode == 0 and output.decode().strip() == str(folder), errors


def test_names_and_folders_that_are_no_model(cache, tmp_path):
    assert NAME in error_of(models.find, "no-such-model")
    assert NAME in error_of(models.fetch, str(tmp_path))
    assert "config.json" in error_of(models.find, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "safetensors" in error_of(models.find, tmp_path)
    assert "config.json" in error_of(models.find, tmp_path / "config.json")


def test_paths_that_cannot_even_be_looked_at(cache, monkeypatch):
    assert "cannot be looked for" in error_of(models.find, "~nosuchuser/x")
    assert "too long" in error_of(models.find, "x" * 300)

    def forbidden(self, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", forbidden)
    assert "Permission denied" in error_of(models.find, "/somewhere")


def test_a_folder_of_ones_own_is_found(cache, tmp_path, monkeypatch):
    write_checkpoint(None, tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    assert models.find(f"./{tmp_path.name}") == tmp_path
    recorded = models.weights_hash(tmp_path)
    assert len(recorded) == 32 and not (tmp_path / models.HASH_FILE).exists()


def test_the_recorded_hash_is_that_of_the_weights(cache, conversions):
    folder = models.fetch(NAME)
    recorded = models.weights_hash(folder)
    (folder / "model.safetensors").write_bytes(b"other weights")
    assert "delete it" in error_of(models.weights_hash, folder)
    (folder / models.HASH_FILE).unlink()
    assert models.weights_hash(folder) != recorded
    write_checkpoint(None, folder)
    assert models.weights_hash(folder) == recorded


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TETRI_CACHE", str(tmp_path / "file"))
    assert "TETRI_CACHE" in error_of(models.fetch, NAME)
    assert "file cannot be written: set TETRI_CACHE" in error_of(models.cache_for, NAME)
    monkeypatch.setenv("TETRI_CACHE", "relative")
    assert "absolute" in error_of(models.find, NAME)


@pytest.fixture
def homeless(monkeypatch):
    """As a user without HOME and without an entry in the system's list of users."""

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(os, "environ", {})


def test_without_a_home_the_cache_must_be_named_and_is_enough(homeless, conversions, tmp_path, monkeypatch):
    for call in (models.find, models.fetch, models.cache_for):
        assert "set TETRI_CACHE" in error_of(call, NAME)
    assert "set TETRI_CACHE" in error_of(models.lend_home)
    monkeypatch.setenv("TETRI_CACHE", str(tmp_path / "cache"))
    models.fetch(NAME)
    models.lend_home()
    assert Path.home() == tmp_path / "cache" and getpass.getuser() == str(os.getuid())


@pytest.mark.parametrize("writable", [True, False])
def test_a_home_is_lent_only_where_it_cannot_be_written_and_moves_no_cache(cache, tmp_path, monkeypatch, writable):
    monkeypatch.setenv("HOME", str(tmp_path if writable else tmp_path / "nowhere"))
    monkeypatch.delenv("TETRI_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    before = models.cache()
    models.lend_home()
    assert Path.home() == (tmp_path if writable else before) and models.cache() == before


def test_the_cache_may_be_below_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TETRI_CACHE", "~/of mine")
    assert models.cache() == tmp_path / "of mine"


def test_a_prepared_model_needs_no_cache_that_can_be_written(cache, conversions, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "set TETRI_CACHE" in error_of(models.find, NAME)
    assert models.main(["--cache", NAME]) == 1 and "set TETRI_CACHE" in capsys.readouterr().err
    models.fetch(NAME)
    assert models.main(["--cache", NAME]) == 0 and capsys.readouterr().out == f"{cache}\n"


def test_the_command_says_what_is_wrong(cache, capsys):
    assert models.main(["no-such-model"]) == 1
    assert models.main([]) == 2 == models.main(["--cash", NAME])
    output = capsys.readouterr()
    assert output.out == "" and len(output.err.splitlines()) == 3


@pytest.mark.model
def test_the_real_model_is_complete(tmp_path):
    import tokenizers

    folder = models.find(NAME)
    for file in folder.iterdir():
        if file.name != models.HASH_FILE:
            (tmp_path / file.name).symlink_to(file)
    assert models.weights_hash(folder) == models.weights_hash(tmp_path), "recorded as it is"
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode("The capital of France is").ids
    assert ids == [504, 3575, 282, 4649, 314]
    assert "<|im_start|>" in (folder / "chat_template.jinja").read_text()
