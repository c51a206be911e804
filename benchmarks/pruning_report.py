"""The trials of benchmarks.pruning as rows, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.pruning_arms import CURVE, RANDOM, Size
from model_runner.evaluation.nll import difference
from model_runner.scoring import Scores

FULL = "full"
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Trial:
    """A memory and its scores by domain; gamma: "kept" from the full memory, or "new"."""

    policy: str
    share: float
    gamma: str
    size: Size
    prune_s: float  # with indexing
    scores: dict[str, Scores]

    def label(self) -> str:
        """What it is, in a line."""
        return f"{self.policy}, {self.share:.0%}, gamma {self.gamma}"


def rows_of(trials: Sequence[Trial], plain: dict[str, Scores]) -> list[Row]:
    """A row per trial; the first is the full memory."""
    full = trials[0].scores
    at_random = {(t.share, t.gamma): t.scores["shifted"] for t in trials if t.policy == RANDOM}
    return [_row(trial, plain, full, at_random.get((trial.share, trial.gamma))) for trial in trials]


def _row(
    trial: Trial, plain: dict[str, Scores], full: dict[str, Scores], at_random: Scores | None
) -> Row:
    shifted, in_domain = trial.scores["shifted"], trial.scores["in_domain"]
    kept, kept_se = gain_kept(shifted, full["shifted"], plain["shifted"])
    compared = None if at_random is None else asdict(difference(shifted, at_random))
    return {
        "policy": trial.policy,
        "share": trial.share,
        "gamma": trial.gamma,
        **asdict(trial.size),
        "prune_s": round(trial.prune_s, 1),
        "shifted": asdict(difference(shifted, plain["shifted"])),
        "gain_kept": kept,
        "gain_kept_se": kept_se,
        "in_domain": asdict(difference(in_domain, plain["in_domain"])),
        "in_domain_against_full": asdict(difference(in_domain, full["in_domain"])),
        "against_random": compared,
    }


def gain_kept(pruned: Scores, full: Scores, plain: Scores) -> tuple[float, float]:
    """The share of the full memory's gain that the pruned one has, and the standard error of that ratio.

    All three are scores of the same windows; errors are clustered by example. The full memory must change something.
    """
    change = difference(full, plain).delta
    kept = difference(pruned, plain).delta / change
    residuals = pruned.nll_sums - plain.nll_sums - kept * (full.nll_sums - plain.nll_sums)
    error = difference(replace(plain, nll_sums=plain.nll_sums + residuals), plain).se
    return kept, error / abs(change)


def table_of(rows: Sequence[Row]) -> Table:
    """A line per row."""
    columns = ("policy", "share", "gamma", "entries", "MiB", "prune, s", "B", "gain kept", "A")
    table = Table(*columns, "A, against full", "B, against random")
    for row in rows:
        table.add_row(
            row["policy"],
            f"{row['share']:.0%}",
            row["gamma"],
            f"{row['entries']:,}",
            f"{row['disk_bytes'] / 2**20:.1f}",
            f"{row['prune_s']:.0f}",
            _change(row["shifted"]),
            f"{row['gain_kept']:.1%} ± {row['gain_kept_se']:.1%}",
            _change(row["in_domain"]),
            _change(row["in_domain_against_full"]),
            ""
            if row["against_random"] is None or row["policy"] == RANDOM
            else _change(row["against_random"]),
        )
    return table


def _change(change: Row) -> str:
    return f"{change['delta']:+.4f} ± {change['se']:.4f}"


def plot(rows: Sequence[Row], path: Path) -> None:
    """The share of the gain that is kept over the share of the entries that are, by policy and gamma."""
    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    panel = figure.subplots()
    for number, policy in enumerate(CURVE):
        for gamma, style in (("kept", "-"), ("new", ":")):
            curve = [r for r in rows if (r["policy"], r["gamma"]) == (policy, gamma)]
            points = sorted([*curve, rows[0]], key=lambda row: float(row["share"]))
            panel.errorbar(
                [row["share"] for row in points],
                [row["gain_kept"] for row in points],
                yerr=[row["gain_kept_se"] for row in points],
                color=f"C{number}",
                linestyle=style,
                marker="o",
                capsize=3,
                label=f"{policy}, gamma {gamma}",
            )
    panel.axhline(0.9, color="black", linewidth=0.8, linestyle="--")
    panel.set_xlabel("share of the entries kept")
    panel.set_ylabel("share of the gain kept")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    figure.savefig(path, dpi=140)
