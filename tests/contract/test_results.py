"""docs/results.md is what the stored JSON gives, byte for byte."""

from __future__ import annotations

from pathlib import Path

from model_runner.experiments.report import rendered

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "experiments-2026-11-29"


def test_the_report_is_generated_from_the_results() -> None:
    page = ROOT / "docs" / "results.md"
    assert rendered(RESULTS, page, ROOT / "docs" / "images") == page.read_text()
