"""Writes docs/cli.md and the man pages from the commands: `python docs/generate_cli.py`. A test compares them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from model_runner.cli import app as runner
from router_service import __version__
from router_service.cli import admin, serve
from router_service.cli.options import whole

APPS = {"router-service": serve.app, "router-admin": admin.app, "model-runner": runner.app}
PAGE = Path(__file__).with_name("cli.md")
MAN = Path(__file__).parents[1] / "router_service" / "system" / "man"


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


def man_page(script: str) -> str:
    """Of one of the three, in roff."""
    first, *others = _walk(script, typer.main.get_command(APPS[script]))
    summary = (first[1].help or "").split("\n\n")[0].strip().rstrip(".")
    parts = [
        f'.TH {_roff(script.upper())} 1 "" "knn-moe {__version__}" "kNN-MoE"',
        f".SH NAME\n{_roff(script)} \\- {_roff(' '.join(summary.split()))}",
        f".SH SYNOPSIS\n{_roff(_usage(*first))}",
        ".SH DESCRIPTION",
        *_man_body(*first),
        ".SH COMMANDS",
    ]
    for name, command in others:
        parts += [f'.SS "{_roff(_usage(name, command))}"', *_man_body(name, command)]
    others_of = ", ".join(f"{_roff(other)}(1)" for other in APPS if other != script)
    return "\n".join([*parts, f".SH SEE ALSO\n{others_of}"]) + "\n"


def _man_body(name: str, command: Any) -> Iterator[str]:
    """The paragraphs of a help, and a tagged one per option."""
    for paragraph in (command.help or "").split("\n\n"):
        shown = textwrap.dedent(paragraph.removeprefix("\b\n"))
        as_it_is = paragraph.startswith("\b\n")
        yield ".PP\n" + (f".nf\n{_roff(shown)}\n.fi" if as_it_is else _roff(shown))
    context = typer.Context(command, info_name=name)
    for option in options_of(command):
        names, text = option.get_help_record(context)
        yield f".TP\n.B {_roff(names)}\n{_roff(' '.join(text.split()))}"


def _roff(text: str) -> str:
    """Text that roff prints as it is."""
    lines = (
        text.strip("\n").replace("\\", "\\e").replace("-", "\\-").replace('"', "\\(dq").splitlines()
    )
    return "\n".join(f"\\&{line}" if line[:1] in (".", "'") else line for line in lines)


def write() -> None:
    """All pages."""
    PAGE.write_text(page())
    for script in APPS:
        (MAN / f"{script}.1").write_text(man_page(script))


if __name__ == "__main__":
    write()
