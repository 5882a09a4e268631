"""The programs of tools/: only calls of what is in tetri/bench."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

TOOLS = sorted(path for path in (Path(__file__).parents[2] / "tools").iterdir() if path.is_file())
CALL = 'exec "$root/.venv/bin/python" -P -m '


@pytest.mark.parametrize("program", TOOLS, ids=lambda path: path.name)
def test_a_program_is_nothing_but_a_call(program):
    lines = program.read_text().splitlines()
    assert os.access(program, os.X_OK) and lines[0] == "#!/bin/sh" and len(lines) <= 10
    assert f'    echo "{program.name}: run bin/setup first" >&2' in lines
    module = lines[-1].removeprefix(CALL).removesuffix(' "$@"')
    assert module.startswith("tetri.bench.") and find_spec(module)
    found = find_spec(f"{module}.__main__") if find_spec(module).submodule_search_locations else find_spec(module)
    assert f'main(prog_name="{program.name}")' in Path(found.origin).read_text()
