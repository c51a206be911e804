"""What modules of commands share: groups that import a command when it is used, help with examples, common options."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, wraps
from importlib import import_module
from typing import Annotated, Any, ClassVar, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from router_service import __version__


class _Examples:
    """Marks the paragraphs of a help with indented lines: a backspace on a line of its own stops re-wrapping."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        paragraphs = (kwargs.get("help") or "").split("\n\n")
        marked = [f"\b\n{text}" if "\n  " in text else text for text in paragraphs]
        super().__init__(*args, **kwargs | {"help": "\n\n".join(marked)})


class ExampleCommand(_Examples, TyperCommand):
    """A command whose docstring shows examples."""


class ExampleGroup(_Examples, TyperGroup):
    """A group whose docstring shows examples."""


JsonFlag = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON document on stdout and nothing else, e.g. --json."),
]


class AdminTyper(typer.Typer):
    """Commands of `router-admin`: each takes --json too, as the root does, unless it has a --json of its own."""

    def __init__(self, help_text: str | None = None) -> None:
        super().__init__(
            help=help_text,
            no_args_is_help=help_text is not None,
            add_completion=False,
            pretty_exceptions_enable=False,
            rich_markup_mode=None,
        )

    def command(self, name: str | None = None, **attributes: Any) -> Callable[[Any], Any]:
        """Registers a function that has a `context`."""
        register = super().command(name, **{"cls": ExampleCommand} | attributes)

        def registered(function: Callable[..., None]) -> Callable[..., None]:
            register(_with_json(function))
            return function

        return registered


def _with_json(function: Callable[..., None]) -> Callable[..., None]:
    """The function with a parameter more, which sets `as_json` of the session's output."""
    hints = get_type_hints(function, include_extras=True)
    declared = [each for hint in hints.values() for each in getattr(hint, "__metadata__", ())]
    if any("--json" in _names_of(each) for each in declared):
        return function

    @wraps(function)
    def run(*, as_json: bool, **given: Any) -> None:
        if as_json:
            given["context"].find_root().obj.output.as_json = True
        function(**given)

    signature, kind = inspect.signature(function), inspect.Parameter.KEYWORD_ONLY
    parameters = [one.replace(annotation=hints[n]) for n, one in signature.parameters.items()]
    more = inspect.Parameter("as_json", kind, default=False, annotation=JsonFlag)
    run.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*parameters, more]
    )
    run.__annotations__ = hints | {"as_json": JsonFlag}
    return run


def _names_of(declared: Any) -> tuple[Any, ...]:
    """Of an option; typer has the first one as the default until it reads the annotation."""
    return getattr(declared, "default", None), *(getattr(declared, "param_decls", None) or ())


@dataclass(frozen=True)
class Later:
    """Where a command is, MODULE:NAME in this package: a function of `router-admin`, or a Typer."""

    place: str
    summary: str  # the first sentence of its help


class LazyCommand(TyperCommand):
    """Stands for a command in the help of its group and in completion: importing all of them takes most of a second."""

    def __init__(self, name: str, later: Later) -> None:
        super().__init__(name, help=later.summary)
        self._place = later.place

    @cached_property
    def itself(self) -> Any:
        """The command, imported."""
        module, name = self._place.split(":")
        found = getattr(import_module(f"{__package__}.{module}"), name)
        if not isinstance(found, typer.Typer):
            function, found = found, AdminTyper()
            found.command(self.name)(function)
        command = typer.main.get_command(found)
        command.name = self.name
        return command


class LazyGroup(ExampleGroup):
    """A group whose commands are in `places`, by name."""

    places: ClassVar[Mapping[str, Later]] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name, later in self.places.items():
            self.add_command(LazyCommand(name, later))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command itself, to be run or completed."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, whole(command), rest


def whole(command: Any) -> Any:
    """The command that a LazyCommand stands for; of others themselves."""
    return command.itself if isinstance(command, LazyCommand) else command


def print_version(wanted: bool) -> None:
    """Of --version: prints it and stops."""
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


def complete_memory(context: typer.Context, incomplete: str) -> list[str]:
    """Names of memories at --target, for the shell."""
    os.environ.setdefault(
        "GRPC_VERBOSITY", "NONE"
    )  # what it writes would be on the line that is typed
    from knnmoe.client import memory_names

    given = context.find_root().params
    return memory_names(
        given["target"], incomplete, **{name: given[name] for name in CREDENTIAL_FILES}
    )


CREDENTIAL_FILES = ("ca_file", "cert_file", "key_file", "token_file")


def credential(name: str, help_text: str) -> Any:
    """The option of one of CREDENTIAL_FILES."""
    return typer.Option(metavar="FILE", envvar=f"KNNMOE_{name.upper()}", help=help_text)


MemoryName = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="Name of the memory, e.g. bible.",
        show_default=False,
        autocompletion=complete_memory,
    ),
]

OnlyLayers = Annotated[
    list[int] | None,
    typer.Option(
        min=0,
        help="Only this layer; repeat it for more (--layer 14 --layer 15). All when not given.",
    ),
]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask; needed in scripts, e.g. --yes.")]
