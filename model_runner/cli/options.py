"""Options that several commands share."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

import typer

from model_runner.errors import BadInput
from model_runner.small_moe import MODEL_DIR

if TYPE_CHECKING:
    from model_runner.models import LoadedModel

# Names of recipes.PRESETS, recipes.Norm and router_client.OnError, which need torch; tests compare them.
Preset = Literal["paper", "paper-v2", "recommended", "boosted"]
Norm = Literal["raw", "unit", "soft"]
OnError = Literal["fall_back", "raise"]
# Names of budget.KEY_BYTES, first_pass.CHOICES and retrieval.Where.
FirstPass = Literal["auto", "exact", "pca"]
ReplicaKeys = Literal["f32", "bf16", "f16", "int8"]
Retrieval = Literal["auto", "replica", "remote"]
# For lookups that must not fall back (scores, --skip-known, null entries): a busy sidecar gets its time.
LOOKUP_TIMEOUT_S = 60.0

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
STANDARD_OUTPUT = Path("-")
DEFAULT_TARGET = "127.0.0.1:50051"


def complete_memory(context: typer.Context, incomplete: str) -> list[str]:
    """Names of memories at --target, for the shell."""
    # What gRPC writes would be on the line that is typed.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from knnmoe.client import memory_names

    return memory_names(context.params.get("target") or DEFAULT_TARGET, incomplete)


Memory = Annotated[
    str,
    typer.Option(
        "--memory", help="Name of the memory at the sidecar.", autocompletion=complete_memory
    ),
]
Window = Annotated[
    int | None,
    typer.Option(
        "--window",
        min=2,
        help="Tokens that the model reads in one go. Default: as many as the model was made for, at most 512.",
    ),
]
DRAWN = "so many windows at most: as many of each document as can be, drawn evenly. Default: all."
LeaveOneOut = Annotated[
    bool,
    typer.Option(
        "--leave-one-out", help="Never read entries of the scored example: for reference text."
    ),
]
ScoringTimeout = Annotated[
    float,
    typer.Option("--timeout-s", min=0.001, help="Longest wait for one lookup in the sidecar."),
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

Snippets = Annotated[
    bool,
    typer.Option(
        "--snippets/--no-snippets",
        help="Keep with each entry up to 160 bytes of the words around its token, which `model-runner explain` shows.",
    ),
]

RetrievalOption = Annotated[
    Retrieval,
    typer.Option(
        "--retrieval",
        envvar="KNNMOE_RETRIEVAL",
        help="Where lookups are answered: replica (a copy of the memory beside the model, kept in step with the "
        "sidecar), remote (in the sidecar), auto (a replica where it fits).",
    ),
]
ReplicaMemory = Annotated[
    str | None,
    typer.Option(
        "--replica-memory",
        envvar="KNNMOE_REPLICA_MEMORY",
        metavar="SIZE",
        help="What a replica may take, e.g. 2GiB, 512MiB, or bytes. Default: half of what is free on the device.",
    ),
]
ReplicaKeysOption = Annotated[
    ReplicaKeys,
    typer.Option(
        "--replica-keys",
        help="How a replica keeps the keys: f32 (answers as the sidecar's), or in half or a quarter of the bytes and "
        "about the same answers (docs/retrieval.md).",
    ),
]
FirstPassOption = Annotated[
    FirstPass,
    typer.Option(
        "--first-pass",
        help="How a replica on a CPU is searched: exact (every key is looked at), pca (reduced keys choose candidates, "
        "where at least 99 % of the nearest are found that way), auto (pca where it is faster).",
    ),
]
MaxStaleness = Annotated[
    float | None,
    typer.Option(
        "--max-staleness-s",
        min=0,
        help="A replica that the sidecar has said nothing to for longer gives no answers. Default: no bound while "
        "text is generated, 10 s where lookups that fail end the work.",
    ),
]


def load(model: str, device: str, dtype: str) -> LoadedModel:
    """The model of these options; the default one is said on stderr. Raises as models.load_model."""
    from model_runner.models import load_model

    if model == DEFAULT_MODEL:
        sys.stderr.write(
            "model: the small one that ships with this package; --model DIRECTORY or NAME for another\n"
        )
    return load_model(model, device=device, dtype=dtype)


def retrieval(
    where: Retrieval,
    replica_memory: str | None,
    replica_keys: ReplicaKeys,
    first_pass: FirstPass,
    max_staleness_s: float | None = None,
) -> Any:
    """The options as a model_runner.retrieval.Retrieval. Raises BadInput for what is no size."""
    from model_runner.replica.budget import parse_bytes
    from model_runner.retrieval import Retrieval as Chosen
    from model_runner.retrieval import Where

    most = None if replica_memory is None else parse_bytes(replica_memory)
    return Chosen(Where(where), most, replica_keys, first_pass, max_staleness_s)


def fraction(value: float | None) -> float | None:
    """A callback of options between 0 and 1."""
    if value is not None and not 0 < value < 1:
        raise typer.BadParameter(f"{value} is not between 0 and 1, both excluded.")
    return value


def existing(given: Path | list[Path] | None) -> Path | list[Path] | None:
    """A callback of options and arguments that name files, or - for stdin, which `exists` of typer does not take."""
    for path in given if isinstance(given, list) else [given]:
        if path is not None and str(path) != "-" and not path.exists():
            raise typer.BadParameter(f"File {str(path)!r} does not exist.")
    return given


def file_option(explained: str) -> Any:
    """An option that names a file, which must be there, or - for stdin."""
    return typer.Option(help=explained, dir_okay=False, callback=existing, show_default=False)


JSON_FILE = "- is standard output, where nothing else is written then."


def require_writable(option: str, path: Path | None) -> None:
    """Notices before the work what would fail after it. Raises BadInput."""
    if path in (None, STANDARD_OUTPUT):
        return
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise BadInput(f"{option}: got {path}, expected a file in a directory that exists, or -")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise BadInput(f"{option}: got {path}, expected a file that may be written")


def words_beside(*files: Path | None) -> TextIO:
    """Where a command says what it has found: stdout, unless that is for one of the files alone."""
    return sys.stderr if STANDARD_OUTPUT in files else sys.stdout


def write_json(path: Path | None, document: Any) -> None:
    """What --json names, if anything. Raises OSError."""
    if path is not None:
        write_text(path, json.dumps(document, indent=2, allow_nan=False) + "\n")


def write_text(path: Path | None, text: str | None) -> None:
    """To the file that an option names, if any; - is standard output. Raises OSError."""
    if path is None or text is None:
        return
    if path == STANDARD_OUTPUT:
        sys.stdout.write(text)
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:  # a full disk is of no file, unless it is named
        raise OSError(error.errno, error.strerror, str(path)) from error


Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")]
Durability = Annotated[
    Literal["process", "fsync"],
    typer.Option(
        help="What a learnt entry survives: process (SIGKILL of the sidecar), fsync (loss of power)."
    ),
]
