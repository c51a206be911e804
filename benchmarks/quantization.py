"""What compressed search keys do to the shipped model: `python -m benchmarks.quantization --json FILE`.

Builds the recommended memory once, as `model-runner demo` does, through a real sidecar; then quantizes it with one
method after the other and scores the same windows of the shifted test text. Bytes per key, recall and time per query
are measured by the service on one layer (MeasureQuantization), with router inputs of the dev text.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from knnmoe.channels import open_channel
from knnmoe.v1 import quantization_pb2 as pb
from knnmoe.v1.quantization_pb2_grpc import QuantizationServiceStub
from rich.console import Console
from rich.table import Table

from benchmarks.demo_memory import Bench, running_bench
from benchmarks.report import load_average, machine
from model_runner.evaluation.demo import DemoSettings, Texts, draw_texts
from model_runner.evaluation.nll import difference
from model_runner.models import LoadedModel, load_model
from model_runner.progress import Progress
from model_runner.scoring import Scores
from model_runner.small_moe import MODEL_DIR
from model_runner.wire import encode_floats

SCHEMA = 1
MEMORY = "quantized"
TIMEOUT_S = 1800.0
COMPRESSIONS = (
    "none", "float16", "int8", "turbo4", "turbo2", "turbo1", "binary", "product",
    "pca32", "pca32+int8", "random32",
)  # fmt: skip
MEASURED = (
    "ram_bytes_per_key", "disk_bytes_per_key", "recall_at_1", "lambda_error_mean", "blend_error_mean",
    "ms_per_query", "build_s",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Settings:
    """What is built and scored."""

    seed: int = 0
    reference_windows: int = 240
    dev_windows: int = 16
    test_windows: int = 48
    queries: int = 300
    measured_layer: int = 3
    compressions: tuple[str, ...] = COMPRESSIONS


class Run:
    """One memory in one sidecar."""

    def __init__(self, bench: Bench, settings: Settings) -> None:
        self._bench, self._settings = bench, settings
        self._texts = _texts(bench.loaded, settings)

    def results(self) -> list[dict[str, Any]]:
        """A row per compression; the first is the baseline of the changes in NLL."""
        bench, windows = self._bench, self._texts.shifted
        bench.build(MEMORY, self._texts.reference, "none")
        inputs = bench.inputs(self._texts.dev, self._settings.queries)
        bench.calibrate(MEMORY, inputs)
        plain = bench.plain(windows)
        measured = self._measure(inputs[self._settings.measured_layer])
        rows, baseline = [], None
        for label in bench.progress.track(self._settings.compressions, "scoring", "methods"):
            self._quantize(label)
            scores = bench.routed(MEMORY, windows)
            baseline = baseline or scores
            rows.append(_row(label, scores, baseline, plain, measured[label]))
        return rows

    def _measure(self, inputs: torch.Tensor) -> dict[str, pb.CompressionMeasurement]:
        request = pb.MeasureQuantizationRequest(
            memory=MEMORY, compressions=self._settings.compressions
        )
        request.inputs.add(layer=self._settings.measured_layer, router_inputs=encode_floats(inputs))
        with open_channel(self._bench.target) as channel:
            replies = QuantizationServiceStub(channel).MeasureQuantization(
                request, timeout=TIMEOUT_S
            )
            found = [reply.measurement for reply in replies if reply.HasField("measurement")]
        return {measurement.compression: measurement for measurement in found}

    def _quantize(self, label: str) -> None:
        with open_channel(self._bench.target) as channel:
            request = pb.QuantizeRequest(memory=MEMORY, compression=label)
            for _ in QuantizationServiceStub(channel).Quantize(request, timeout=TIMEOUT_S):
                pass


def _texts(loaded: LoadedModel, settings: Settings) -> Texts:
    sizes = DemoSettings(
        seed=settings.seed,
        reference_windows=settings.reference_windows,
        dev_windows=settings.dev_windows,
        shifted_test_windows=settings.test_windows,
        general_test_windows=1,
    )
    return draw_texts(loaded.tokenizer, sizes)


def _row(
    label: str, scores: Scores, baseline: Scores, plain: Scores, cost: pb.CompressionMeasurement
) -> dict[str, Any]:
    return {
        "compression": label,
        "oversampling": cost.oversampling,
        "nll": scores.nll,
        "against_none": asdict(difference(scores, baseline)),
        "against_plain": asdict(difference(scores, plain)),
        **{name: getattr(cost, name) for name in MEASURED},
    }


def run(settings: Settings) -> dict[str, Any]:
    """Everything that the JSON file holds."""
    started = time.monotonic()
    with running_bench(load_model(str(MODEL_DIR), device="cpu"), Progress()) as bench:
        rows = Run(bench, settings).results()
    return {
        "schema": SCHEMA,
        "settings": asdict(settings),
        "rows": rows,
        "machine": machine(),
        "load_average": load_average(),
        "elapsed_s": round(time.monotonic() - started, 1),
    }


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    """A line per compression."""
    columns = ("", "x", "RAM B/key", "disk B/key", "recall@1", "error of lambda", "ms/query")
    table = Table(*columns, "NLL against none", "against the plain model")
    for row in rows:
        none, plain = row["against_none"], row["against_plain"]
        table.add_row(
            row["compression"],
            f"{row['oversampling']:g}",
            f"{row['ram_bytes_per_key']:.0f}",
            f"{row['disk_bytes_per_key']:.0f}",
            f"{row['recall_at_1']:.4f}",
            f"{row['lambda_error_mean']:.1e}",
            f"{row['ms_per_query']:.3f}",
            f"{none['delta']:+.5f} ± {none['se']:.5f}",
            f"{plain['delta']:+.4f} ± {plain['se']:.4f}",
        )
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table, writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="the numbers go here")
    parser.add_argument("--seed", type=int, default=0, help="draws the windows")
    parser.add_argument("--reference-windows", type=int, default=240)
    parser.add_argument("--test-windows", type=int, default=48)
    parser.add_argument(
        "--methods",
        default=",".join(COMPRESSIONS),
        help="the first is the baseline of the changes in NLL",
    )
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = run(
        Settings(
            seed=given.seed,
            reference_windows=given.reference_windows,
            test_windows=given.test_windows,
            compressions=tuple(given.methods.split(",")),
        )
    )
    given.json.write_text(json.dumps(results, indent=1) + "\n")
    Console().print(table_of(results["rows"]))


if __name__ == "__main__":
    main()
