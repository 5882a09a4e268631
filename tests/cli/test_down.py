"""tetri-cli down where nothing is up. tests/proc/test_launch.py has what it takes down."""


def test_nothing_up(run, place):
    for command in (["submit", "x"], ["status"], ["chat"]):
        status, out, err = run(*command)
        assert (status, out) == (3, "") and "run tetri-cli up" in err and err.count("\n") == 1
    assert run("down") == (0, "", f"nothing is up in {place}\n")
