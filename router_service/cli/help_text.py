"""Help with examples: indented lines of a docstring keep their line breaks in --help."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup

__all__ = ["ExampleCommand", "ExampleGroup"]


class ExampleCommand(TyperCommand):
    """A command whose docstring shows examples."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **_kept(kwargs))


class ExampleGroup(TyperGroup):
    """A group whose docstring shows examples."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **_kept(kwargs))


def _kept(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Marks the paragraphs with indented lines: a backspace on a line of its own stops re-wrapping."""
    paragraphs = (kwargs.get("help") or "").split("\n\n")
    marked = [f"\b\n{text}" if "\n  " in text else text for text in paragraphs]
    return kwargs | {"help": "\n\n".join(marked)}
