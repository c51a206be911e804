"""--help and --version import what prints them; the stand-ins of commands say what the commands say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from router_service import __version__
from router_service.cli import admin, serve
from router_service.cli.options import LazyCommand, whole

APPS = {"router-admin": admin.app, "router-service": serve.app}
MODULES = {"router-admin": "admin", "router-service": "serve"}
SCRIPTS = pytest.mark.parametrize("script", APPS)
# typer, and what it needs.
FEW = {"typer", "shellingham", "typing_extensions", "annotated_doc"}
_RUN = """
import json, sys
before = set(sys.modules)
from router_service.cli.{module} import app
try:
    app({words!r})
finally:
    print(json.dumps(sorted(set(sys.modules) - before)), file=sys.stderr)
"""


def _run(script: str, *words: str) -> tuple[str, list[str]]:
    """What a command prints, and the modules that it imports."""
    code = _RUN.format(module=MODULES[script], words=list(words))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout, json.loads(done.stderr)


@SCRIPTS
@pytest.mark.parametrize("words", [["--help"], ["--version"]])
def test_help_and_version_import_little(script: str, words: list[str]) -> None:
    printed, modules = _run(script, *words)
    assert printed == f"{__version__}\n" if words == ["--version"] else "Commands:" in printed
    others = {name.split(".")[0] for name in modules} - set(sys.stdlib_module_names)
    assert others - FEW == {"router_service"}
    own = {name for name in modules if name.startswith("router_service.")}
    cli = "router_service.cli"
    assert own <= {cli, *(f"{cli}.{name}" for name in ("errors", "options", MODULES[script]))}
    assert "asyncio" not in modules


def test_a_command_imports_no_engine() -> None:
    _, modules = _run("router-admin", "memory", "list", "--help")
    assert not {name.split(".")[0] for name in modules} & {
        "qdrant_edge",
        "qdrant_client",
        "pyarrow",
    }
    assert "router_service.cli.migrate_command" not in modules


@SCRIPTS
def test_stand_ins_say_what_the_commands_say(script: str) -> None:
    group: Any = typer.main.get_command(APPS[script])
    stand_ins = [each for each in group.commands.values() if isinstance(each, LazyCommand)]
    assert stand_ins
    for one in stand_ins:
        said = whole(one).get_short_help_str(limit=1000)
        assert one.get_short_help_str(limit=1000) == said, one.name
        assert one.name == whole(one).name


def test_every_module_of_commands_is_reached() -> None:
    named = {later.place.split(":")[0] for later in admin.AdminGroup.places.values()}
    folder = Path(admin.__file__).parent
    assert named == {file.stem for file in folder.glob("*_command*.py")} - {"serve_command"}
