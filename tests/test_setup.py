"""bin/setup and the launchers, run for real in a copy of their folder, with a stub in Python's place."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ("cat", "cksum", "awk", "df", "dirname", "du", "grep", "mkdir", "readlink", "rm", "sh", "tail")

# Answers the questions that bin/setup asks of a Python, makes a stub environment with itself as its Python,
# writes down each pip and model call, and fails where the file `fail` holds a word of the call.
PYTHON = """
log() { echo "${PYTHONPATH+foreign }${PYTHONHOME+foreign }$*" >>"$STUB/calls"; }
case "$1 $2" in
"-V "*) echo Python 3.11.0 ;;
"-c import ensurepip"*) echo "$STUB/bin/python3.11" ;;
"-c import fcntl"*) ;;
"-m venv") mkdir -p "$3/bin" && cat "$0" >"$3/bin/python" && chmod +x "$3/bin/python" ;;
*)
    [ "$3" = --cache ] || log "$*"
    case "$* " in *" $(cat "$STUB/fail") "*) cat "$STUB/says" >&2; exit 1 ;; esac
    [ "$2" != tetri.models ] || echo /models/stub ;;
esac
"""


FOREIGN = {"PYTHONPATH": "/elsewhere", "PYTHONHOME": "/elsewhere"}  # of another environment


class Checkout:
    """A folder with the set-up's files and a PATH on which nothing else is."""

    def __init__(self, folder: Path):
        self.root, self.stub = folder / "checkout", folder / "stub"
        (self.stub / "bin").mkdir(parents=True)
        for name in ("bin", "tools", "requirements"):
            shutil.copytree(ROOT / name, self.root / name)
        (self.root / "tetri").mkdir()
        for name in ("setup.cfg", "pyproject.toml", "tetri/__init__.py"):
            shutil.copy(ROOT / name, self.root / name)
        for name in (*PROGRAMS, "chmod"):
            (self.stub / "bin" / name).symlink_to(shutil.which(name))
        self.program("python3.11", PYTHON)
        self.fail_at("nothing")

    def program(self, name: str | Path, text: str) -> None:
        path = self.stub / "bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def fail_at(self, word: str, saying: str = "") -> None:
        (self.stub / "fail").write_text(word)
        (self.stub / "says").write_text(saying)

    def settings(self) -> dict[str, str]:
        return {"PATH": str(self.stub / "bin"), "STUB": str(self.stub), **FOREIGN}

    def run(self, program: str = "bin/setup", *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        (self.stub / "calls").write_text("")
        command, settings = [self.root / program, *arguments], self.settings()
        done = subprocess.run(command, env=settings | environment, capture_output=True, text=True, cwd="/", timeout=60)
        assert "foreign" not in (self.stub / "calls").read_text()
        return done

    def steps(self) -> list[str]:
        """The pip and model calls of the last run, each by what tells it apart."""
        words = ("cpu.txt", "cpu-nodeps.txt", "-e", "tetri.models")
        calls = (self.stub / "calls").read_text().splitlines()
        return [next(word for word in words if any(part.endswith(word) for part in c.split())) for c in calls]


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def error_of(result: subprocess.CompletedProcess) -> str:
    assert result.returncode != 0 and result.stdout == ""
    return result.stderr.splitlines()[-1]


def test_all_steps_once_and_nothing_the_second_time(checkout):
    assert checkout.run().returncode == 0
    assert checkout.steps() == ["cpu.txt", "cpu-nodeps.txt", "-e", "tetri.models"]
    assert checkout.run().returncode == 0
    assert checkout.steps() == ["tetri.models"]


@pytest.mark.parametrize("stderr", ["2>&-", "2>/dev/full"])
def test_what_nobody_can_read_stops_nothing(checkout, stderr):
    checkout.program("quiet", f'exec "{checkout.root}/bin/setup" {stderr}')
    assert subprocess.run([checkout.stub / "bin" / "quiet"], env=checkout.settings(), timeout=60).returncode == 0
    assert checkout.steps() == ["cpu.txt", "cpu-nodeps.txt", "-e", "tetri.models"]


def test_a_changed_file_repeats_its_own_step_only(checkout):
    checkout.run()
    with open(checkout.root / "requirements" / "cpu-nodeps.txt", "a") as file:
        file.write("# changed\n")
    checkout.run()
    assert checkout.steps() == ["cpu-nodeps.txt", "tetri.models"]


def test_a_half_finished_run_is_taken_up_where_it_stopped(checkout):
    checkout.fail_at("requirements/cpu-nodeps.txt", "ERROR: [Errno 28] No space left on device\n")
    assert "No space left on device" in error_of(checkout.run())
    half = checkout.root / ".venv/lib/python3.11/site-packages/half-1.0.dist-info"
    half.mkdir(parents=True)
    checkout.fail_at("nothing")
    assert checkout.run().returncode == 0
    assert checkout.steps() == ["cpu-nodeps.txt", "-e", "tetri.models"]
    assert not half.exists()


def test_a_moved_checkout_gets_a_new_environment(checkout, tmp_path):
    checkout.run()
    checkout.root = checkout.root.rename(tmp_path / "moved")
    assert checkout.run().returncode == 0
    assert "cpu.txt" in checkout.steps()


def test_no_network_is_said(checkout):
    checkout.fail_at("requirements/cpu.txt", "WARNING: Retrying after connection broken by 'X'\nERROR: none\n")
    assert "no network" in error_of(checkout.run())


@pytest.mark.parametrize(
    ("programs", "environment", "says"),
    [
        ({"python3.11": "exit 1"}, {}, "Python 3.11"),
        ({"python3.11": "exit 1", "python3": "exit 1"}, {}, "Python 3.11"),
        ({"df": "echo header\necho /dev/x 9 9 100 9% /"}, {}, "too little disk"),
    ],
    ids=["no python", "none at all", "no room"],
)
def test_what_is_missing_is_said_before_anything_is_made(checkout, programs, environment, says):
    for name, does in programs.items():
        checkout.program(name, does)
    assert says in error_of(checkout.run(**environment))
    assert not (checkout.root / ".venv").exists()


def test_a_cache_that_cannot_be_used_is_the_only_line_and_nothing_is_made(checkout):
    checkout.fail_at("--cache", "tetri.models: set TETRI_CACHE\n")
    assert checkout.run().stderr == "tetri.models: set TETRI_CACHE\n"
    assert not (checkout.root / ".venv").exists()


def test_pip_gets_a_home_where_there_is_none(checkout):
    checkout.program("python3.11", PYTHON.replace('log "$*"', 'log "$HOME ${TETRI_CACHE-} $*"'))
    assert checkout.run().returncode == 0
    calls = [call.split()[:2] for call in (checkout.stub / "calls").read_text().splitlines()]
    assert calls and all(call == ["/models/stub", "/models/stub"] for call in calls), calls


TOOLS = [path for path in ROOT.glob("tools/*") if path.name != "setup_browser"]
LAUNCHERS = sorted(path.relative_to(ROOT) for path in [*ROOT.glob("bin/tetri-*"), *TOOLS])


@pytest.mark.parametrize("path", LAUNCHERS, ids=str)
def test_launchers(tmp_path, path):
    checkout = Checkout(tmp_path / "with a space and ü")
    link = checkout.stub / "elsewhere"
    link.symlink_to(os.path.relpath(checkout.root / path, checkout.stub))

    def run():
        environment = os.environ | FOREIGN
        done = subprocess.run([link, "a", "b  c"], env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    assert run() == (1, "elsewhere: run bin/setup first\n")
    program = path.name if path.parts[0] == "bin" else "python"
    shown = 'echo "${0##*/} $1 ${PYTHONPATH-} ${PYTHONHOME-}"; for last; do :; done; echo "$last"'
    checkout.program(checkout.root / ".venv" / "bin" / program, shown)
    assert run() == (0, f"{program} {'a' if program == path.name else '-P'}  \nb  c\n")


# ---------------------------------------------------------------- tools/setup_browser


def set_up_browser(checkout, uid="0", **environment):
    """The status, the last line, and the calls of pip and apt."""
    checkout.program("id", f"echo {uid}")
    done = checkout.run("tools/setup_browser", **environment)
    calls = (checkout.stub / "calls").read_text().splitlines()
    return done.returncode, done.stderr.splitlines()[-1], [call.replace("--no-input ", "") for call in calls]


def apt(checkout, does=":"):
    checkout.program("apt-get", f'echo "apt-get $*" >>"$STUB/calls"; {does}')


def test_a_browser_comes_after_the_rest(checkout):
    assert set_up_browser(checkout) == (1, "setup_browser: run bin/setup first", [])


def test_a_browser_that_is_there_only_needs_its_driver_once(checkout):
    checkout.run()
    checkout.program("chromium", "exit 1")
    pip = "-m pip --disable-pip-version-check install -r requirements/browser.txt"
    ready = f"setup_browser: ready; the browser is {checkout.stub}/bin/chromium"
    assert set_up_browser(checkout) == (0, ready, [pip])
    assert set_up_browser(checkout) == (0, ready, [])
    checkout.program("mine", "exit 1")
    assert set_up_browser(checkout, TETRI_CHROMIUM=f"{checkout.stub}/bin/mine")[1] == ready.replace("chromium", "mine")


def test_root_gets_a_browser_from_apt(checkout):
    checkout.run()
    apt(checkout, f'case "$1" in install) /bin/ln -s /bin/true "{checkout.stub}/bin/chromium" ;; esac')
    status, says, calls = set_up_browser(checkout)
    assert status == 0 and says.endswith("bin/chromium")
    assert calls[1:] == ["apt-get update", "apt-get install -y --no-install-recommends chromium"]


def test_why_there_is_no_browser_is_one_line(checkout):
    checkout.run()
    assert "takes root and apt" in set_up_browser(checkout)[1]
    apt(checkout, "echo no such package; exit 100")
    assert "takes root and apt" in set_up_browser(checkout, uid="1000")[1]
    assert "apt cannot install Chromium: no such package" in set_up_browser(checkout)[1]
    (checkout.root / "requirements" / "browser.txt").write_text("other")
    checkout.fail_at("requirements/browser.txt", "ERROR: no such version\n")
    assert "ERROR: no such version" in set_up_browser(checkout)[1]


# ---------------------------------------------------------------- bin/test


@pytest.fixture
def tested(checkout):
    """Runs bin/test over stubs: what it says, its exit status, and pytest's arguments for each group."""
    for folder in ("tests/core/prefill", "tests/sim", *(f"tetri/{each}" for each in ("core/prefill", "core/decode"))):
        (checkout.root / folder).mkdir(parents=True)
    for file in ("tests/test_text.py", "tests/core/test_decode.py", "tetri/text.py", "tetri/wire.py", "tetri/sim.py"):
        (checkout.root / file).write_text("")
    for name in ("setup", "check"):
        checkout.program(checkout.root / "bin" / name, f'echo "{name}" >>"$STUB/calls"')
    checkout.program(checkout.root / ".venv" / "bin" / "python", PYTHON)

    def run(*arguments):
        done = checkout.run("bin/test", *arguments)
        calls = (checkout.stub / "calls").read_text().splitlines()
        return done, [call.partition(" -m not model and not gpu and not browser ")[2] or call for call in calls]

    return run


@pytest.mark.parametrize(
    ("package", "place"),
    [
        ("core", "tests/core"),
        ("core/prefill", "tests/core/prefill"),
        ("core/decode", "tests/core/test_decode.py"),
        ("sim", "tests/sim"),
        ("text", "tests/test_text.py"),
    ],
)
def test_a_package_is_tested_alone_and_nothing_is_checked(tested, package, place):
    done, calls = tested(package, "-k", "word")
    assert done.returncode == 0 and calls == ["setup", f"{place} -k word"]


def test_without_a_package_all_is_checked_and_arguments_are_those_of_pytest(tested):
    for arguments in ((), ("-k", "core"), ("tests/sim", "-x"), ("tests/test_text.py::test_one",)):
        done, calls = tested("--fast", *arguments)
        assert done.returncode == 0 and calls[:2] == ["setup", "check"]
        assert calls[2].endswith(" ".join(arguments)) and len(calls) == 3
    assert len(tested("tests/sim")[1]) == 6


@pytest.mark.parametrize(("name", "says"), [("cor", "tetri has no package 'cor'"), ("wire", "no tests of the package")])
def test_a_package_that_is_not_there_is_one_line(tested, name, says):
    done, calls = tested(name)
    assert done.returncode == 2 and says in error_of(done) and done.stderr.count("\n") == 1 and calls == []
