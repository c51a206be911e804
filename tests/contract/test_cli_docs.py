"""docs/cli.md is what the commands say, every command teaches by example, and docs/formats.md tells the truth."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from docs.generate_cli import APPS, MAN, PAGE, commands, man_page, options_of, page
from router_service.arrays import Provenance
from router_service.memories.settings import Kind
from router_service.transfer.endpoints import EntryShape
from router_service.transfer.entry_fields import PROVENANCE_FIELDS
from router_service.transfer.file import open_reader

COMMANDS = dict(commands())
# Options of typer, whose help is typer's. Those of model-runner are in the examples of its commands.
COMPLETION = ("install_completion", "show_completion")
FORMATS = PAGE.with_name("formats.md")


def test_the_pages_are_those_of_the_commands() -> None:
    assert PAGE.read_text() == page(), "run `python docs/generate_cli.py`"
    for script in APPS:
        found = (MAN / f"{script}.1").read_text()
        assert found == man_page(script), "run `python docs/generate_cli.py`"


def test_every_console_script_is_there() -> None:
    scripts = tomllib.loads((PAGE.parents[1] / "pyproject.toml").read_text())["project"]["scripts"]
    assert {name for name in COMMANDS if " " not in name} == set(scripts)


def test_every_command_is_there() -> None:
    names = {name for name, command in COMMANDS.items() if not hasattr(command, "commands")}
    memory = {f"router-admin memory {verb}" for verb in ("list", "show", "create", "set", "delete")}
    verbs = ("upsert", "count", "export", "import", "merge", "calibrate", "optimize", "stats")
    verbs += ("health", "doctor", "sources", "delete", "prune", "migrate")
    verbs += tuple(f"operations {verb}" for verb in ("list", "show", "cancel"))
    snapshots = ("create", "list", "verify", "restore", "pack", "delete")
    verbs += tuple(f"snapshot {verb}" for verb in snapshots)
    assert names >= memory | {f"router-admin {verb}" for verb in verbs} | {"router-service serve"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str) -> None:
    command: Any = COMMANDS[name]
    assert command.help
    if not hasattr(command, "commands"):
        assert re.search("[Ee]xample:$", command.help, flags=re.MULTILINE)
        assert re.search(rf"{name.split()[0]} .*{name.split()[-1]}", command.help)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_help_with_an_example(name: str) -> None:
    for option in options_of(COMMANDS[name]):
        assert option.help, f"{name}: {option.name} has no help"
        if name.startswith("model-runner") or option.name in COMPLETION:
            continue
        teaches = "e.g." in option.help or "--" in option.help or "FILE." in option.help
        assert teaches, f"{name}: {option.name} has no example"


def test_the_exit_codes_are_documented() -> None:
    from router_service.cli.errors import ExitCode

    text = COMMANDS["router-admin"].help
    codes = {int(code) for code in re.findall(r"^  (\d+)  ", text, flags=re.MULTILINE)}
    assert codes == {int(code) for code in ExitCode}


def test_every_field_of_an_entry_is_documented() -> None:
    text = FORMATS.read_text()
    assert set(PROVENANCE_FIELDS) == set(Provenance.__dataclass_fields__)
    for field in ("id", "layer", "key", "value", "experts", "weights", *PROVENANCE_FIELDS):
        assert f"| `{field}` |" in text


@pytest.mark.parametrize(
    ("kind", "number"),
    [(Kind.LOGIT_DELTA, 0), (Kind.ASSIGNMENT, 1)],
    ids=["logit_delta", "assignment"],
)
def test_the_examples_of_formats_are_read(tmp_path: Path, kind: Kind, number: int) -> None:
    examples = re.findall(r"```json\n(.*?)```", FORMATS.read_text(), flags=re.DOTALL)
    file = tmp_path / "example.jsonl"
    file.write_text(examples[number])
    [batch] = open_reader(file, EntryShape(kind, 4, 3, 2)).read()
    assert len(batch) == 1
