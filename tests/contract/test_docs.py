"""What docs name is there: files, directories, and links to other pages."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from model_runner.cli.app import app as model_runner
from router_service.cli.admin import app as router_admin
from router_service.cli.serve import app as router_service

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Paths under these directories are named from the root; others are examples, or relative to a room.
_PATH = re.compile(
    r"`((?:router_service|model_runner|protos|tests|benchmarks|examples|docker|docs)/[\w./-]*)`"
)
_LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)")
# Commands in blocks, or quoted in a line.
_PROGRAMS = {
    "router-admin": router_admin,
    "router-service": router_service,
    "model-runner": model_runner,
}
_COMMAND = re.compile(
    rf"^(?:{'|'.join(_PROGRAMS)}) [^#\n]*|(?<=[^`]`)(?:{'|'.join(_PROGRAMS)}) [^`]*", re.M
)
COMMANDS = sorted(set(_COMMAND.findall((ROOT / "docs" / "operations.md").read_text())))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_and_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    named = [ROOT / path for path in _PATH.findall(text)]
    linked = [page.parent / link for link in _LINK.findall(text)]
    assert [str(path) for path in named + linked if not path.exists()] == []


def test_the_rooms_of_the_architecture_are_those_of_the_service() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    rooms = {path.parent.name for path in (ROOT / "router_service").glob("*/__init__.py")}
    assert {room for room in rooms if f"`{room}/`" not in text} == set()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_run_book_are_there(command: str) -> None:
    program, *words = shlex.split(command)
    done = CliRunner().invoke(_PROGRAMS[program], [*words, "--help"])
    assert done.exit_code == 0, done.output


def test_a_command_that_there_is_not_is_noticed() -> None:
    for words in (["memory", "paint"], ["memory", "list", "--bright"]):
        assert CliRunner().invoke(router_admin, [*words, "--help"]).exit_code == 2
