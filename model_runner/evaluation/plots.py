"""Pictures of results.json: the change in NLL per arm, lambda per layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

SHIFTED, IN_DOMAIN = "#2a6f97", "#d98032"
_COLOURS = {"shifted": SHIFTED, "in_domain": IN_DOMAIN}
_LABELS = {"shifted": "shifted text (B)", "in_domain": "general text (A)"}


def plot_deltas(arms: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars of `delta` with 95 % intervals, one panel per domain; zero_shot, the baseline, is the zero line."""
    domains = [
        d for d in _LABELS if any(a["domain"] == d and a["name"] != "zero_shot" for a in arms)
    ]
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    panels = figure.subplots(1, len(domains), squeeze=False, width_ratios=[3, 2][: len(domains)])[0]
    for panel, domain in zip(panels, domains, strict=True):
        rows = [a for a in arms if a["domain"] == domain and a["name"] != "zero_shot"]
        _bars(panel, rows, _COLOURS[domain])
        panel.set_title(f"{_LABELS[domain]}, {rows[0]['windows']} windows", fontsize=10)
    panels[0].set_xlabel("change in NLL, nats per token (left is better)")
    _save(figure, path)


def _bars(panel: Any, rows: Sequence[dict[str, Any]], colour: str) -> None:
    names = [r["name"].replace("_", " ") for r in rows]
    deltas, halves = [r["delta"] for r in rows], [1.96 * r["se"] for r in rows]
    panel.barh(
        names, deltas, xerr=halves, color=colour, capsize=3, height=min(0.6, 0.1 * len(rows))
    )
    panel.axvline(0, color="black", linewidth=0.8)
    panel.invert_yaxis()
    panel.grid(axis="x", alpha=0.3)
    panel.tick_params(labelsize=9)
    gap = 0.03 * max(abs(d) + h for d, h in zip(deltas, halves, strict=True))
    for number, (delta, half) in enumerate(zip(deltas, halves, strict=True)):
        side, where = (1, "left") if delta >= 0 else (-1, "right")
        at = delta + side * (half + gap)
        panel.annotate(f"{delta:+.3f}", (at, number), ha=where, va="center", fontsize=8)
    panel.margins(x=0.25)


def plot_lambdas(arms: Sequence[dict[str, Any]], path: Path) -> None:
    """Mean lambda per layer on both texts, a panel per memory: high where a close case exists."""
    names = [n for n in ("knn_moe", "knn_moe_recommended") if any(a["name"] == n for a in arms)]
    figure = Figure(figsize=(8.5, 3.4), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        for arm in (a for a in arms if a["name"] == name):
            values = arm["lambda_mean"]
            panel.plot(
                range(len(values)),
                values,
                marker="o",
                color=_COLOURS[arm["domain"]],
                label=_LABELS[arm["domain"]],
            )
        panel.set_title(name.replace("_", " "), fontsize=10)
        panel.set_xlabel("MoE layer")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_ylim(0, 1)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("mean lambda")
    panels[-1].legend(fontsize=9)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with mpl.rc_context({"svg.hashsalt": "knn-moe"}):
        figure.savefig(path, dpi=140)
