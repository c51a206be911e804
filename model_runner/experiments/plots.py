"""Plots of results, where a curve says more than a table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from model_runner.experiments.results import Result, Row, of_experiment

Line = tuple[str, Sequence[float], Sequence[float]]
"""Label, x and y."""


def draw_all(results: Sequence[Result], images: Path) -> None:
    """Of the experiments that have a plot and results."""
    for name, draw in PLOTS.items():
        if found := of_experiment(results, name):
            draw(found, images / file_name(name))


def file_name(experiment: str) -> str:
    """Of its plot."""
    return f"experiment-{experiment}.png"


def _panels(
    results: Sequence[Result],
    path: Path,
    lines_of: Callable[[Sequence[Result]], list[Line]],
    labels: tuple[str, str],
    style: dict[str, Any],
) -> None:
    """A panel per model and domain."""
    studies: dict[str, list[Result]] = {}
    for result in results:
        studies.setdefault(f"{result.model}, {result.domain}", []).append(result)
    figure = Figure(
        figsize=(4.4 * min(3, len(studies)), 3.4 * -(-len(studies) // 3)), layout="constrained"
    )
    grid = figure.subplots(-(-len(studies) // 3), min(3, len(studies)), squeeze=False).flat
    shown = []
    for panel, (title, found) in zip(grid, studies.items(), strict=False):
        for label, x, y in lines_of(found):
            panel.plot(x, y, marker="o", markersize=3.5, label=label, **style.get("line", {}))
            shown.append([title, label, list(x), list(y)])
        panel.set_title(title, fontsize=9)
        panel.set_xlabel(labels[0], fontsize=8)
        panel.set_ylabel(labels[1], fontsize=8)
        panel.axhline(0, color="black", linewidth=0.6)
        panel.grid(alpha=0.3)
        if "x" in style:
            panel.set_xscale(style["x"])
        panel.legend(fontsize=7)
    digest = hashlib.sha256(json.dumps(shown).encode()).hexdigest()
    with mpl.rc_context({"svg.hashsalt": "knn-moe"}):
        figure.savefig(path, dpi=110, metadata={"Description": digest})


def _means(
    results: Sequence[Result], name: str, x: str, pick: Callable[[Any], float | None]
) -> dict[str, dict[float, float]]:
    """Of `pick`, over seeds: by the value of a column, then by x."""
    found: dict[str, dict[float, list[float]]] = {}
    for result in results:
        for row in result.rows:
            if (value := pick(row)) is not None:
                found.setdefault(row[name], {}).setdefault(row[x], []).append(value)
    return {key: {at: fmean(v) for at, v in each.items()} for key, each in found.items()}


def _delta(text: str, row: Row) -> float:
    return float(row[text]["delta"])


def _size(results: Sequence[Result], path: Path) -> None:
    def lines(found: Sequence[Result]) -> list[Line]:
        drawn = list[Line]()
        for text in ("domain", "general"):
            means = _means(found, "method", "reference", partial(_delta, text))
            drawn += [(f"{m} on {text}", list(y), list(y.values())) for m, y in means.items()]
        return drawn

    _panels(results, path, lines, ("windows of the reference", "change in NLL"), {"x": "log"})


def _lambda0(results: Sequence[Result], path: Path) -> None:
    """Gain over harm: each method's curve over lambda0, and over s0."""

    def lines(found: Sequence[Result]) -> list[Line]:
        points: dict[str, dict[tuple[float, float], list[tuple[float, float]]]] = {}
        for result in found:
            for row in result.rows:
                if row["split"] != "dev":
                    continue
                by_null = row["method"] == "recommended" and row["null_weight"] != 0.5
                label = f"{row['method']}{', s0' if by_null else ''}"
                at = points.setdefault(label, {}).setdefault(
                    (row["lambda0"], row["null_weight"]), []
                )
                at.append((row["general"]["delta"], row["domain"]["delta"]))
        return [
            (
                label,
                [fmean(h for h, _ in seeds) for _, seeds in sorted(each.items())],
                [fmean(g for _, g in seeds) for _, seeds in sorted(each.items())],
            )
            for label, each in points.items()
        ]

    _panels(
        results, path, lines, ("change on general text (dev)", "change on the domain (dev)"), {}
    )


def _selective(results: Sequence[Result], path: Path) -> None:
    """Change over the share of lookups that were made; the plain model makes none."""

    def lines(found: Sequence[Result]) -> list[Line]:
        by_share = partial(_means, found, "signal", "rate")
        shares = by_share(lambda row: row["domain_looked_up"])
        deltas = by_share(partial(_delta, "domain"))
        [full] = deltas.pop("all").values()
        return [
            (signal, [0.0, *shares[signal].values(), 1.0], [0.0, *each.values(), full])
            for signal, each in deltas.items()
        ]

    _panels(results, path, lines, ("share of lookups", "change in NLL"), {})


def _drift(results: Sequence[Result], path: Path) -> None:
    def lines(found: Sequence[Result]) -> list[Line]:
        blocks: dict[str, list[list[float]]] = {}
        for result in found:
            seen: dict[str, int] = {}
            for row in result.rows:
                at = seen[row["stream"]] = seen.get(row["stream"], -1) + 1
                of_stream = blocks.setdefault(row["stream"], [])
                of_stream.extend([] for _ in range(at + 1 - len(of_stream)))
                of_stream[at].append(row["delta"])
        return [(s, list(range(len(b))), [fmean(v) for v in b]) for s, b in blocks.items()]

    _panels(results, path, lines, ("block of the stream", "change in NLL"), {})


PLOTS: dict[str, Callable[[Sequence[Result], Path], None]] = {
    "size": _size,
    "lambda0": _lambda0,
    "selective": _selective,
    "drift": _drift,
}
