"""`model-runner evaluate`: from options to calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from model_runner.evaluation.nll import bootstrap_interval, difference, score
from model_runner.models import load_model
from model_runner.progress import Progress
from model_runner.router_client import OnError, RouterClient
from model_runner.routing_policy import RetrievalPolicy
from model_runner.texts import Window, read_windows


def run_evaluate(
    text: Path,
    memory: str,
    model: str,
    target: str,
    window: int,
    max_windows: int | None,
    batch_size: int,
    leave_one_out: bool,
    timeout_s: float,
    device: str,
    dtype: str,
    progress: Progress,
) -> dict[str, Any]:
    """Scores with the plain model, then with the memory; the numbers of the printed table."""
    loaded = load_model(model, device=device, dtype=dtype)
    windows = _spread(read_windows(text, loaded.tokenizer, window), max_windows)
    with RouterClient(
        target, memory, loaded.fingerprint, timeout_s=timeout_s, on_error=OnError.RAISE
    ) as client:
        client.describe()  # a wrong memory is noticed before anything is scored
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


def _spread(windows: list[Window], most: int | None) -> list[Window]:
    if most is None or most >= len(windows):
        return windows
    return [windows[i * len(windows) // most] for i in range(most)]
