"""The systemd unit, its file of options and the man pages say what the commands do."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from docs.generate_cli import APPS, MAN, commands, options_of
from router_service.cli.given_settings import Given
from router_service.cli.serve_command import EXIT_BAD_INPUT

ROOT = Path(__file__).parents[2]
SYSTEM = ROOT / "router_service" / "system"
UNIT, OPTIONS = SYSTEM / "router-service.service", SYSTEM / "router-service.toml"


def _section(name: str) -> dict[str, str]:
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(UNIT.read_text())
    return dict(parser[name])


def _program(tmp_path: Path) -> Path:
    """The unit as it is installed here."""
    script = Path(sys.executable).with_name("router-service")
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/knn-moe/bin/router-service", str(script)))
    return unit


def test_the_unit_calls_what_is_there() -> None:
    program, command, *words = shlex.split(_section("Service")["ExecStart"])
    assert (Path(program).name, command) == ("router-service", "serve")
    flags = {
        name
        for option in options_of(dict(commands())["router-service serve"])
        for name in option.opts
    }
    assert {word for word in words if word.startswith("--")} <= flags
    assert _section("Service")["RestartPreventExitStatus"] == str(EXIT_BAD_INPUT)


def test_the_unit_is_hardened() -> None:
    service = _section("Service")
    assert service["Type"] == "notify"
    assert service["Restart"] == "on-failure"
    assert service["DynamicUser"] == "yes"
    assert service["ProtectSystem"] == "strict"
    assert service["StateDirectory"] in service["ExecStart"]


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    done = subprocess.run(
        [analyze, "verify", "--man=no", _program(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_every_line_of_the_file_of_options_can_be_used(tmp_path: Path) -> None:
    text = re.sub(r"^# ([a-z-]+ = )", r"\1", OPTIONS.read_text(), flags=re.MULTILINE)
    assert len(tomllib.loads(text)) > len(tomllib.loads(OPTIONS.read_text()))
    for each in (OPTIONS.read_text(), text):
        (tmp_path / "all.toml").write_text(each)
        given = Given.read({"data": tmp_path}, tmp_path / "all.toml")
        assert given.settings().listen == "127.0.0.1:50051"


@pytest.mark.parametrize("script", APPS)
def test_the_man_pages_have_every_command(script: str) -> None:
    page = MAN / f"{script}.1"
    for name, _ in commands():
        if name.split()[0] == script:
            assert name.replace("-", "\\-") in page.read_text()
    if groff := shutil.which("groff"):
        command = [groff, "-man", "-Tutf8", "-ww", "-z", page]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stderr == ""


def test_they_are_shared_data_of_the_wheel() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"][
        "targets"
    ]["wheel"]
    shared = {ROOT / source: target for source, target in wheel["shared-data"].items()}
    assert shared == {
        MAN: "share/man/man1",
        UNIT: f"share/knn-moe/{UNIT.name}",
        OPTIONS: f"share/knn-moe/{OPTIONS.name}",
    }
