"""A picture of what `router-admin quantize --measure` found."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from router_service.cli.admin_errors import BadInput

_PANELS = (
    ("recall_at_1", "recall@1"),
    ("lambda_error_mean", "mean error of lambda"),
    ("blend_error_mean", "mean error of the blend"),
    ("ms_per_query", "ms per query"),
)


def require_plotting() -> None:
    """Raises BadInput when matplotlib is missing: better before minutes of measuring than after."""
    if find_spec("matplotlib") is None:
        raise BadInput('--plot needs matplotlib; install it with: pip install "knn-moe[runner]"')


def plot_measurements(found: Sequence[dict[str, Any]], path: Path) -> None:
    """Each quantity against the bytes of RAM per key, a mark per method and layer. Raises BadInput."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    for panel, (quantity, label) in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
        for compression in dict.fromkeys(row["compression"] for row in found):
            rows = [row for row in found if row["compression"] == compression]
            sizes = [row["ram_bytes_per_key"] for row in rows]
            panel.plot(sizes, [row[quantity] for row in rows], "o", label=compression)
        panel.set_xscale("log")
        panel.set_xlabel("bytes of RAM per key")
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise BadInput(f"--plot: {path}: {error}") from error
