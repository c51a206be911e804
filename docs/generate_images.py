"""Draws docs/images/delta_nll.png from the stored results of the demo: `python docs/generate_images.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from model_runner.evaluation.demo import plot_deltas

PICTURE = Path(__file__).with_name("images") / "delta_nll.png"
# Of `model-runner demo --seed 0`.
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "demo-2026-11-29.json"


def arms() -> list[dict[str, Any]]:
    """Of the stored results."""
    found: list[dict[str, Any]] = json.loads(RESULTS.read_text())["arms"]
    return found


if __name__ == "__main__":
    plot_deltas(arms(), PICTURE)
