import stat

from click.testing import CliRunner

from tetri import cli
from tetri.net import keys


def test_a_key_is_made_once_for_its_owner_alone(tmp_path):
    path = tmp_path / "key"
    made = CliRunner().invoke(cli.group, ["keygen", str(path)])
    assert made.exit_code == 0 and "a new key" in made.output
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = keys.load(str(path))
    again = CliRunner().invoke(cli.group, ["keygen", str(path)])
    assert again.exit_code == cli.FAILED and "never overwritten" in again.output
    assert keys.load(str(path)) == before


def test_a_place_that_does_not_exist_is_one_line(tmp_path):
    made = CliRunner().invoke(cli.group, ["keygen", str(tmp_path / "no" / "key")])
    assert made.exit_code == cli.FAILED and "cannot be made (no such file or directory)" in made.output
