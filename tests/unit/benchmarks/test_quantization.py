"""Rows and table of benchmarks.quantization."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from knnmoe.client import ExampleRef
from knnmoe.v1 import quantization_pb2 as pb
from rich.console import Console

from benchmarks.quantization import COMPRESSIONS, _row, table_of
from model_runner.scoring import Scores
from router_service.backends.base import Compression, Quantization


def scores(nll: float) -> Scores:
    sums = np.array([1.0, 1.1, 0.9]) * nll * 10
    examples = tuple(ExampleRef("a", str(number)) for number in range(3))
    return Scores(sums, np.full(3, 10.0), examples)


def test_every_method_is_tried_and_none_is_the_baseline() -> None:
    assert COMPRESSIONS[0] == "none"
    assert {Compression.parse(label).quantization for label in COMPRESSIONS} == set(Quantization)


def test_a_row_has_changes_of_loss_and_costs() -> None:
    cost = pb.CompressionMeasurement(recall_at_1=0.5, ram_bytes_per_key=96, oversampling=2)
    row = json.loads(json.dumps(_row("turbo4", scores(4.1), scores(4.0), scores(4.5), cost)))
    assert row["against_none"]["delta"] == pytest.approx(0.1)
    assert row["against_plain"]["delta"] == pytest.approx(-0.4)
    out = io.StringIO()
    Console(file=out, width=200).print(table_of([row]))
    assert all(word in out.getvalue() for word in ("turbo4", "96", "0.5000", "+0.10000"))
