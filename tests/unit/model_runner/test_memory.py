"""What a RoutingMemory reports."""

from __future__ import annotations

import pytest

from model_runner import LayerReport, MemoryReport


def test_a_report_reads_as_a_line() -> None:
    layers = (LayerReport(600, 6, 0, 0.25), LayerReport(200, 200, 0, 0.05))
    report = MemoryReport(layers, 1280, {"deadline": 4, "breaker_open": 396})
    assert (report.tokens, report.lambda_by_layer) == (600, (0.25, 0.05))
    assert report.lambda_mean == pytest.approx((600 * 0.25 + 200 * 0.05) / 800)
    assert str(report) == (
        "600 tokens, lambda 0.20 on average (layer 0 0.25, layer 1 0.05), "
        "fallbacks: 400 of 1280 (396 breaker_open, 4 deadline)"
    )


def test_a_report_of_nothing() -> None:
    report = MemoryReport((LayerReport(), LayerReport()))
    assert str(report) == (
        "0 tokens, lambda 0.00 on average (layer 0 0.00, layer 1 0.00), fallbacks: none"
    )


def test_what_is_not_finite_is_said() -> None:
    assert "(layer 0 0.50), 2 tokens that are not finite, fallbacks: none" in str(
        MemoryReport((LayerReport(3, 0, 2, 0.5),))
    )
