"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from model_runner.small_moe import MODEL_DIR

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
    int, typer.Option("--window", min=2, help="Tokens that the model reads in one go.")
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Windows per forward pass.")]
Text = Annotated[
    Path,
    typer.Option(
        help="Text file: .jsonl or .parquet with `text`, or `prompt` and `answer` (the loss counts "
        "on the answer only); anything else is plain text.",
        show_default=False,
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")]
