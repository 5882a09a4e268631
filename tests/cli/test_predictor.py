"""tetri-cli predictor: its commands are there, and are loaded when they are used."""

import subprocess
import sys

import pytest

from tetri import cli


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["predictor", "--help"])
    listed = [line.split()[0] for line in capsys.readouterr().out.partition("Commands:")[2].splitlines() if line]
    assert (ended.value.code, listed) == (0, ["collect", "train", "eval"])


@pytest.mark.parametrize("name", ["collect", "train", "eval"])
def test_each_command_has_help_and_names_what_is_missing(name, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["predictor", name, "--help"])
    assert ended.value.code == 0 and "--json" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        cli.main(["predictor", name])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and "Missing option" in err and err.count("\n") == 1


def test_an_unknown_command_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["predictor", "predict"])
    assert ended.value.code == 2 and "No such command 'predict'" in capsys.readouterr().err


def test_help_loads_neither_torch_nor_numpy():
    program = "import sys\nfrom tetri import cli\ntry:\n    cli.main(['predictor', '--help'])\nexcept SystemExit:\n"
    program += "    print(*sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stderr == "\n"
