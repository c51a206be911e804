"""Writes docs/cli.md from the commands themselves: `python docs/generate_cli.py`. A test compares the two."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from model_runner.cli import app as runner
from router_service.cli import admin, serve
from router_service.cli.options import whole

APPS = {"router-service": serve.app, "router-admin": admin.app, "model-runner": runner.app}
PAGE = Path(__file__).with_name("cli.md")


def commands() -> Iterator[tuple[str, Any]]:
    """Every command and group with its full name, in the order of --help."""
    for name, app in APPS.items():
        yield from _walk(name, typer.main.get_command(app))


def page() -> str:
    """The whole reference in Markdown."""
    parts = [
        "# Command-line reference\n",
        "<!-- made by docs/generate_cli.py from the commands; do not edit -->\n",
        "Each of the three completes commands and options in bash, zsh, fish and PowerShell: run it once with\n"
        "`--install-completion` and open a new shell.\n",
    ]
    for name, command in commands():
        parts += _section(name, command)
    return "\n".join(parts)


def options_of(command: Any) -> list[Any]:
    """Arguments and options, without --help."""
    return [p for p in command.params if p.name != "help"]


def _walk(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    yield name, command
    for child in getattr(command, "commands", {}).values():
        yield from _walk(f"{name} {child.name}", whole(child))


def _section(name: str, command: Any) -> Iterator[str]:
    depth = "##" if " " not in name else "###"
    yield f"{depth} {name}\n"
    yield f"```\n{_usage(name, command)}\n```\n"
    for paragraph in (command.help or "").split("\n\n"):
        yield _paragraph(paragraph)
    context = typer.Context(command, info_name=name)
    rows = [_row(*option.get_help_record(context)) for option in options_of(command)]
    if rows:
        yield "| | |\n|---|---|\n" + "\n".join(rows) + "\n"


def _usage(name: str, command: Any) -> str:
    words = [name]
    if any(p.param_type_name == "option" for p in options_of(command)):
        words.append("[OPTIONS]")
    words += [
        p.metavar or p.name.upper() for p in command.params if p.param_type_name == "argument"
    ]
    if hasattr(command, "commands"):
        words.append("COMMAND")
    return " ".join(words)


def _paragraph(text: str) -> str:
    """Indented lines become a code block, after the line that introduces them."""
    if not text.startswith("\b\n"):
        return text.replace("\n", " ") + "\n"
    lines = text.removeprefix("\b\n").splitlines()
    first = f"{lines.pop(0)}\n\n" if lines[0].endswith(":") else ""
    return first + "```\n" + textwrap.dedent("\n".join(lines)) + "\n```\n"


def _row(name: str, text: str) -> str:
    """What --help says of an argument or option, its type, default and environment variable included."""
    cells = (f"`{name}`", text)
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(page())
