"""tetri-cli predictor: its commands are there, and each names what is missing."""

import pytest


def test_help_lists_the_commands(run):
    status, out, _ = run("predictor", "--help")
    listed = [line.split()[0] for line in out.partition("Commands:")[2].splitlines() if line]
    assert (status, listed) == (0, ["collect", "train", "eval"])


@pytest.mark.parametrize("name", ["collect", "train", "eval"])
def test_each_command_has_help_and_names_what_is_missing(run, name):
    status, out, _ = run("predictor", name, "--help")
    assert status == 0 and "--json" in out
    status, out, err = run("predictor", name)
    assert (status, out, err.count("\n")) == (2, "", 1) and "Missing option" in err
