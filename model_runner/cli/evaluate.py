"""`model-runner evaluate`: from options to calls."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from knnmoe.client import AdminClient
from rich.console import Console
from rich.table import Table

from model_runner.errors import BadInput
from model_runner.evaluation.nll import bootstrap_interval, difference, score
from model_runner.memory_builder.entries import entry_ids
from model_runner.models import load_model, window_length
from model_runner.progress import Progress
from model_runner.router_client import OnError, RouterClient
from model_runner.routing_policy import RetrievalPolicy
from model_runner.texts import Window, read_windows

log = logging.getLogger(__name__)

WINDOWS_LOOKED_UP = 32


def run_evaluate(
    text: Path,
    memory: str,
    model: str,
    target: str,
    window: int | None,
    max_windows: int | None,
    batch_size: int,
    leave_one_out: bool,
    timeout_s: float,
    device: str,
    dtype: str,
    progress: Progress,
) -> dict[str, Any]:
    """Scores with the plain model, then with the memory; the numbers of the printed table."""
    with AdminClient(target) as admin:
        admin.describe(memory)  # what is not there is noticed before the model is loaded
    loaded = load_model(model, device=device, dtype=dtype)
    length = window_length(loaded.model, window)
    windows = _spread(read_windows(text, loaded.tokenizer, length), max_windows)
    if not leave_one_out:
        _warn_of_own_entries(target, memory, windows, text.name)
    with RouterClient(
        target, memory, loaded.fingerprint, timeout_s=timeout_s, on_error=OnError.RAISE
    ) as client:
        client.describe()  # another model's memory is noticed before anything is scored
        plain = score(
            loaded.model, windows, None, progress, what="plain model", batch_size=batch_size
        )
        policy = RetrievalPolicy(client)
        routed = score(
            loaded.model,
            windows,
            policy,
            progress,
            what=f"with memory {memory}",
            batch_size=batch_size,
            leave_one_out=leave_one_out,
        )
    change = difference(routed, plain)
    return {
        "model": model,
        "memory": memory,
        "text": text.name,
        "windows": change.windows,
        "zero_shot": {"nll": plain.nll, "perplexity": plain.perplexity},
        "knn_moe": {
            "nll": routed.nll,
            "perplexity": routed.perplexity,
            "delta": change.delta,
            "se": change.se,
            "bootstrap_95": list(bootstrap_interval(routed, plain, seed=0)),
            "lambda_mean": [policy.use[layer].lambda_mean for layer in sorted(policy.use)],
        },
    }


def _warn_of_own_entries(target: str, memory: str, windows: list[Window], name: str) -> None:
    """A memory that holds the very tokens that are scored knows the answers."""
    ids = entry_ids(windows[:WINDOWS_LOOKED_UP])
    with AdminClient(target) as client:
        found = client.count(memory, 0, ids)
    if found:
        log.warning(
            "memory %r holds %d of the first %d scored tokens (entries of a file named %s): "
            "use --leave-one-out, or text that it was not built from",
            *(memory, found, len(ids), name),
        )


def require_writable(option: str, path: Path | None) -> None:
    """Notices before the work what would fail after it."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise BadInput(f"{option}: got {path}, expected a file in a directory that exists")


def print_scores(result: dict[str, Any]) -> None:
    """A table on stdout."""
    table = Table("", "NLL", "perplexity", "change in NLL", "95 % interval")
    plain, with_memory = result["zero_shot"], result["knn_moe"]
    table.add_row("plain model", f"{plain['nll']:.4f}", f"{plain['perplexity']:.2f}", "", "")
    low, high = with_memory["bootstrap_95"]
    one_example = math.isnan(with_memory["se"])
    table.add_row(
        "with memory",
        f"{with_memory['nll']:.4f}",
        f"{with_memory['perplexity']:.2f}",
        f"{with_memory['delta']:+.4f}" + ("" if one_example else f" ± {with_memory['se']:.4f}"),
        "needs two examples" if one_example else f"{low:+.4f} to {high:+.4f}",
    )
    console = Console()
    console.print(table)
    lambdas = " ".join(f"{value:.2f}" for value in with_memory["lambda_mean"])
    console.print(
        f"{result['windows']} windows; mean lambda per layer: {lambdas}",
        highlight=False,
        soft_wrap=True,
    )


def write_scores(result: dict[str, Any], path: Path) -> None:
    """The numbers as JSON."""
    path.write_text(json.dumps(_finite(result), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """The same numbers for JSON, which has no NaN: null in its place."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _spread(windows: list[Window], most: int | None) -> list[Window]:
    if most is None or most >= len(windows):
        return windows
    return [windows[i * len(windows) // most] for i in range(most)]
