"""Whether what was measured over a long run grows: robust slopes, a table in Markdown, a picture."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.faults import results

# Of the run, which the curves' first part is left out of: pools fill, allocators settle.
WARM_UP = 0.2
WINDOWS = 24
_COLUMNS = ("curve", "median:", "highest:", "slope per minute:", "over the run:", "bound:", "")
_PICTURES_BESIDE = 3


@dataclass(frozen=True, slots=True)
class Bound:
    """What a curve may do, in its unit.

    Attributes:
        least, share: it may grow over a run by the larger of a number and of a share of its level.
        cap: what has a size that it fills slowly is held to that instead: no window's median may be above.

    """

    least: float = 0.0
    share: float = 0.0
    cap: float | None = None

    def of(self, level: float) -> float:
        return max(self.least, self.share * level)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one curve, in its unit. `growth`: the slope times the run's length; `most`: the highest window's median."""

    curve: str
    level: float
    highest: float
    slope_per_minute: float
    growth: float
    most: float
    bound: float
    capped: bool

    @property
    def flat(self) -> bool:
        """It may fall."""
        return (self.most if self.capped else self.growth) < self.bound

    @property
    def limit(self) -> str:
        """The bound, in words."""
        return f"{'level ' if self.capped else ''}{self.bound:,.1f}"


def judge(
    minutes: Sequence[float], curves: Mapping[str, Sequence[float]], bounds: Mapping[str, Bound]
) -> list[Verdict]:
    """One verdict a curve; `minutes` f64 [n] since the start, ascending. Raises ValueError for too few samples."""
    return [
        verdict(name, np.asarray(minutes), np.asarray(curves[name], np.float64), bound)
        for name, bound in bounds.items()
    ]


def verdict(
    name: str, minutes: NDArray[np.float64], values: NDArray[np.float64], bound: Bound
) -> Verdict:
    """Of samples [n] at so many minutes [n]."""
    times, medians = windows(minutes, values)
    slope, level = theil_sen(times, medians), float(np.median(medians))
    capped = bound.cap is not None
    return Verdict(
        *(name, level, float(values.max()), slope, slope * float(minutes[-1])),
        most=float(medians.max()),
        bound=bound.of(level) if bound.cap is None else bound.cap,
        capped=capped,
    )


def windows(
    minutes: NDArray[np.float64], values: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Middles and medians [w] of windows after the warm-up: what comes and goes within one does not count."""
    kept = minutes >= WARM_UP * minutes[-1]
    count = min(WINDOWS, int(kept.sum()) // 2)
    if count < 2:
        raise ValueError(f"{len(minutes)} samples, expected enough for two windows after a warm-up")
    parts = zip(
        np.array_split(minutes[kept], count), np.array_split(values[kept], count), strict=True
    )
    middles = [(float(np.mean(when)), float(np.median(what))) for when, what in parts]
    return np.array([when for when, _ in middles]), np.array([what for _, what in middles])


def theil_sen(times: NDArray[np.float64], values: NDArray[np.float64]) -> float:
    """The median of the slopes of all pairs: up to 29 % of the values may be anything."""
    pairs = itertools.combinations(range(len(times)), 2)
    return float(np.median([(values[j] - values[i]) / (times[j] - times[i]) for i, j in pairs]))


def table(verdicts: Sequence[Verdict]) -> str:
    """In Markdown."""
    rows = [
        (
            *(each.curve, f"{each.level:,.1f}", f"{each.highest:,.1f}"),
            *(f"{each.slope_per_minute:+,.3f}", f"{each.growth:+,.1f}", each.limit),
            ("held" if each.capped else "flat") if each.flat else "**grows**",
        )
        for each in verdicts
    ]
    return results.table(_COLUMNS, rows) + "\n"


def draw(
    minutes: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    verdicts: Sequence[Verdict],
    picture: Path,
) -> None:
    """Each curve, what it is judged by, and the line of its slope. matplotlib comes with the runner extra."""
    from matplotlib.figure import Figure

    rows = -(-len(verdicts) // _PICTURES_BESIDE)
    figure = Figure(figsize=(10, 2.1 * rows), layout="constrained")
    axes = figure.subplots(rows, _PICTURES_BESIDE, sharex=True, squeeze=False).flat
    for axis, each in zip(axes, verdicts, strict=False):
        values = np.asarray(curves[each.curve], np.float64)
        times, medians = windows(np.asarray(minutes), values)
        axis.plot(minutes, values, color="0.75", linewidth=0.7)
        axis.plot(times, medians, "o", markersize=2.5)
        middle = float(np.median(medians - each.slope_per_minute * times))
        axis.plot(times, middle + each.slope_per_minute * times, linewidth=1.2)
        axis.set_title(f"{each.curve}: {each.growth:+.1f} (bound {each.limit})", fontsize=8)
        axis.set_ylim(bottom=0, top=1.15 * max(1.0, float(values.max())))
        axis.tick_params(labelsize=7)
    for axis in list(figure.axes)[len(verdicts) :]:
        axis.set_visible(False)
    figure.supxlabel("minutes", fontsize=8)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=80)
