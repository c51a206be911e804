"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from model_runner.errors import BadInput
from model_runner.small_moe import MODEL_DIR

# Names of recipes.PRESETS, recipes.Norm and router_client.OnError, which need torch; tests compare them.
Preset = Literal["paper", "recommended"]
Norm = Literal["raw", "unit", "soft"]
OnError = Literal["fall_back", "raise"]

Model = Annotated[
    str,
    typer.Option(
        "--model",
        help="Local directory or hub name of a Mixture-of-Experts causal LM. "
        "Default: the small one that ships with this package.",
        show_default=False,
    ),
]
DEFAULT_MODEL = str(MODEL_DIR)
Device = Annotated[
    str, typer.Option("--device", help="auto (an accelerator when there is one), cpu, cuda, ...")
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype", help="auto (the checkpoint's; float32 on a CPU), float32, bfloat16, float16."
    ),
]
Target = Annotated[
    str,
    typer.Option(
        "--target",
        envvar="MODEL_RUNNER_TARGET",
        help="Address of the sidecar, HOST:PORT or unix:PATH. Start one with: "
        "router-service serve --data DIR",
    ),
]
DEFAULT_TARGET = "127.0.0.1:50051"
Memory = Annotated[str, typer.Option("--memory", help="Name of the memory at the sidecar.")]
Window = Annotated[
    int | None,
    typer.Option(
        "--window",
        min=2,
        help="Tokens that the model reads in one go. Default: as many as the model was made for, at most 512.",
    ),
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Windows per forward pass.")]
TEXT_FILE = (
    "JSON Lines, JSON, CSV or Parquet with `text`, or `prompt` and `answer` (the loss counts on the answer only), or "
    "`messages` (on the assistant's turns only), and maybe an `id`; any other file is plain text. - is stdin."
)
ReplaceSource = Annotated[
    bool,
    typer.Option(
        "--replace-source",
        help="Put this file in the place of what the memory holds of a file of this name: when all is written, "
        "entries of text that is not in it are deleted.",
    ),
]


def fraction(value: float | None) -> float | None:
    """A callback of options between 0 and 1."""
    if value is not None and not 0 < value < 1:
        raise typer.BadParameter(f"{value} is not between 0 and 1, both excluded.")
    return value


def existing(path: Path | None) -> Path | None:
    """A callback of options and arguments that name a file, or - for stdin, which `exists` of typer does not take."""
    if path is not None and str(path) != "-" and not path.exists():
        raise typer.BadParameter(f"File {str(path)!r} does not exist.")
    return path


def file_option(explained: str) -> Any:
    """An option that names a file, which must be there, or - for stdin."""
    return typer.Option(help=explained, dir_okay=False, callback=existing, show_default=False)


def require_writable(option: str, path: Path | None) -> None:
    """Notices before the work what would fail after it."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise BadInput(f"{option}: got {path}, expected a file in a directory that exists")


Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")]
Durability = Annotated[
    Literal["process", "fsync"],
    typer.Option(
        help="What a learnt entry survives: process (SIGKILL of the sidecar), fsync (loss of power)."
    ),
]
