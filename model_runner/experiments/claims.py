"""Statements of the paper and of this project, and in which studies they hold: functions of results."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from model_runner.experiments.results import Result, Row, of_experiment

PAPERS = ("paper", "paper-v2")


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one study.

    Attributes:
        text: the figure as it is printed.

    """

    study: str
    holds: bool
    figure: float
    text: str


@dataclass(frozen=True, slots=True)
class Claim:
    """A statement, and how it is read off a study's rows.

    Attributes:
        experiment: whose rows.
        read: of all rows of one study: the figure, its text, and whether the statement holds; None: they do not say.

    """

    statement: str
    experiment: str
    read: Callable[[Sequence[Row]], tuple[float, str, bool] | None]

    def verdicts(self, results: Sequence[Result]) -> list[Verdict]:
        """By study."""
        found = []
        for study, rows in _by_study(of_experiment(results, self.experiment)):
            if (read := self.read(rows)) is not None:
                figure, text, holds = read
                found.append(Verdict(study, holds, figure, text))
        return found


def _by_study(results: Sequence[Result]) -> Iterator[tuple[str, list[Row]]]:
    rows: dict[str, list[Row]] = {}
    for result in results:
        study = f"{result.model}, {result.domain}, {result.seed}"
        rows.setdefault(study, []).extend(result.rows)
    yield from rows.items()


def _one(rows: Sequence[Row], **having: object) -> Row | None:
    return next((r for r in rows if all(r.get(k) == v for k, v in having.items())), None)


def _below_zero(row: Row) -> bool:
    """The whole interval of the change on the domain; False where a document is alone."""
    high = row["domain"]["high"]
    return high is not None and high < 0


def _apart(one: Row, other: Row) -> tuple[float, float]:
    """Difference of two gains and its standard error, as if they were independent; NaN where a document is alone."""
    errors = [row["domain"]["se"] for row in (one, other)]
    both = math.hypot(*errors) if None not in errors else math.nan
    return one["domain"]["delta"] - other["domain"]["delta"], both


def _times(
    arm: str, others: Sequence[str], times: float
) -> Callable[[Sequence[Row]], tuple[float, str, bool] | None]:
    """Gain of an arm over that of the best of others; where that gains nothing, any gain holds."""

    def read(rows: Sequence[Row]) -> tuple[float, str, bool] | None:
        mine = _one(rows, arm=arm)
        there = [row for row in (_one(rows, arm=name) for name in others) if row]
        if mine is None or not there:
            return None
        gain = -mine["domain"]["delta"]
        best = max(-row["domain"]["delta"] for row in there)
        if best <= 0:
            return float("inf"), f"{gain:+.3f} against {best:+.3f}", gain > 0
        return gain / best, f"{gain / best:.1f}x", gain / best >= times

    return read


def _harm_at_most(
    arm: str, most: float
) -> Callable[[Sequence[Row]], tuple[float, str, bool] | None]:
    def read(rows: Sequence[Row]) -> tuple[float, str, bool] | None:
        row = _one(rows, arm=arm)
        if row is None:
            return None
        harm = row["general"]["delta"]
        return harm, f"{harm:+.4f}", harm <= most

    return read


def _against_alone(
    text: str, holds: Callable[[float], bool]
) -> Callable[[Sequence[Row]], tuple[float, str, bool] | None]:
    """The change with null entries and their larger step, as a share of that without; no harm has no share."""

    def read(rows: Sequence[Row]) -> tuple[float, str, bool] | None:
        mine, alone = (_one(rows, arm=name) for name in ("recommended", "recommended-alone"))
        if mine is None or alone is None or (text == "general" and alone[text]["delta"] <= 0):
            return None
        share = mine[text]["delta"] / alone[text]["delta"]
        return share, f"{share:.1%}", holds(share)

    return read


def _gains(arm: str) -> Callable[[Sequence[Row]], tuple[float, str, bool] | None]:
    def read(rows: Sequence[Row]) -> tuple[float, str, bool] | None:
        row = _one(rows, arm=arm)
        if row is None:
            return None
        return row["domain"]["delta"], f"{row['domain']['delta']:+.3f}", _below_zero(row)

    return read


def _best_on_dev(
    column: str, value: object, **having: object
) -> Callable[[Sequence[Row]], tuple[float, str, bool] | None]:
    """Whether the best gain on dev among rows of a kind has this value in a column."""

    def read(rows: Sequence[Row]) -> tuple[float, str, bool] | None:
        found = [
            r
            for r in rows
            if r.get("split") == "dev" and all(r.get(k) == v for k, v in having.items())
        ]
        if not found:
            return None
        best = min(found, key=lambda r: r["domain"]["delta"])
        shown = best[column]
        return float(best["domain"]["delta"]), f"{shown} is best", shown == value

    return read


def _steps_gain_nothing(rows: Sequence[Row]) -> tuple[float, str, bool] | None:
    once = _one(rows, method="paper", steps=1, split="dev")
    more = [
        r for r in rows if r.get("method") == "paper" and r.get("split") == "dev" and r["steps"] > 1
    ]
    if once is None or not more:
        return None
    best = min(more, key=lambda r: r["domain"]["delta"])
    extra = best["domain"]["delta"] - once["domain"]["delta"]
    return extra, f"{extra:+.3f} (S = {best['steps']})", extra > -2 * (once["domain"]["se"] or 0.0)


def _high_gains_more(rows: Sequence[Row]) -> tuple[float, str, bool] | None:
    high, low = (
        _one(rows, method="recommended", by="first half", bucket=b) for b in ("high", "low")
    )
    if high is None or low is None:
        return None
    apart, error = _apart(high, low)
    return apart, f"{apart:+.3f} ± {error:.3f}", apart < -2 * error


def _better_than_chance(signal: str) -> Callable[[Sequence[Row]], tuple[float, str, bool] | None]:
    """Gain on the domain at the middle rate, less that of chance at as many lookups, between whose rates is a line."""

    def read(rows: Sequence[Row]) -> tuple[float, str, bool] | None:
        mine, chance = (_one(rows, signal=s, rate=0.5) for s in (signal, "chance"))
        if mine is None or chance is None:
            return None
        _, error = _apart(mine, chance)
        apart = mine["domain"]["delta"] - _by_chance(rows, mine["domain_looked_up"])
        return apart, f"{apart:+.3f} ± {error:.3f}", apart < -2 * error

    return read


def _by_chance(rows: Sequence[Row], looked_up: float) -> float:
    """Change on the domain when so many lookups are made by chance."""
    points = [(0.0, 0.0)]
    points += [
        (row["domain_looked_up"], row["domain"]["delta"])
        for row in rows
        if row.get("signal") in ("chance", "all")
    ]
    shares, deltas = zip(*sorted(points), strict=True)
    return float(np.interp(looked_up, shares, deltas))


def _labels_gain(labels: str) -> Callable[[Sequence[Row]], tuple[float, str, bool] | None]:
    def read(rows: Sequence[Row]) -> tuple[float, str, bool] | None:
        row = _one(rows, method="recommended", labels=labels)
        if row is None:
            return None
        return row["domain"]["delta"], f"{row['domain']['delta']:+.3f}", _below_zero(row)

    return read


def _keeps(keys: str, share: float) -> Callable[[Sequence[Row]], tuple[float, str, bool] | None]:
    """Share of the gain that is left with these keys."""

    def read(rows: Sequence[Row]) -> tuple[float, str, bool] | None:
        full, coded = (
            _one(rows, method="recommended", keys=k, values="f32") for k in ("f32", keys)
        )
        if full is None or coded is None or not full["domain"]["delta"]:
            return None
        kept = coded["domain"]["delta"] / full["domain"]["delta"]
        return kept, f"{kept:.1%}", kept >= share

    return read


def _votes_add(rows: Sequence[Row]) -> tuple[float, str, bool] | None:
    """What votes add to the memory on test, settings of both chosen on dev."""
    memory, both = (_one(rows, method=name, chosen=True) for name in ("memory", "both"))
    if memory is None or both is None:
        return None
    apart, error = _apart(both, memory)
    return apart, f"{apart:+.3f} ± {error:.3f}", apart < -2 * error


def _grows(rows: Sequence[Row]) -> tuple[float, str, bool] | None:
    """From the paper's 500 to 1,000 examples on: what doubling the largest half adds."""
    mine = [r for r in rows if r.get("method") == "recommended"]
    if len(mine) < 2:
        return None
    before, last = mine[-2], mine[-1]
    extra = last["domain"]["delta"] - before["domain"]["delta"]
    shown = f"{extra:+.3f} from {before['reference']} to {last['reference']} windows"
    return extra, shown, extra < 0


def _chooses_better(arm: str) -> Callable[[Sequence[Row]], tuple[float, str, bool] | None]:
    def read(rows: Sequence[Row]) -> tuple[float, str, bool] | None:
        row = _one(rows, arm=arm)
        if row is None:
            return None
        points = 100 * row["change"]
        return points, f"{points:+.1f} points, p = {row['p']:.2g}", points > 0 and row["p"] < 0.05

    return read


CLAIMS = (
    Claim(
        "The paper's first reading gains on the domain (interval below 0)", "main", _gains("paper")
    ),
    Claim("So does the second", "main", _gains("paper-v2")),
    Claim("`recommended` gains", "main", _gains("recommended")),
    Claim("`boosted` gains", "main", _gains("boosted")),
    Claim(
        "The first reading harms general text by at most 0.008",
        "main",
        _harm_at_most("paper", 0.008),
    ),
    Claim(
        "`recommended` gains at least twice what the better reading does",
        "main",
        _times("recommended", PAPERS, 2),
    ),
    Claim("and harms by at most 0.008", "main", _harm_at_most("recommended", 0.008)),
    Claim("at most 0.01", "main", _harm_at_most("recommended", 0.01)),
    Claim(
        "With a step of 3.5 instead of 3 it gains at least twice as much as that reading",
        "main",
        _times("recommended-3.5", PAPERS, 2),
    ),
    Claim("and harms by at most 0.008", "main", _harm_at_most("recommended-3.5", 0.008)),
    Claim(
        "Without null entries it harms by at most 0.008",
        "main",
        _harm_at_most("recommended-alone", 0.008),
    ),
    Claim(
        "With them, and the step that they allow, it gains more",
        "main",
        _against_alone("domain", lambda share: share > 1),
    ),
    Claim("and harms half as much", "main", _against_alone("general", lambda share: share <= 0.5)),
    Claim("`boosted` gains at least three times as much", "main", _times("boosted", PAPERS, 3)),
    Claim("and harms by at most 0.015", "main", _harm_at_most("boosted", 0.015)),
    Claim(
        "Networks distilled from the deltas gain at least as much as `recommended`",
        "main",
        _times("distilled", ("recommended",), 1),
    ),
    Claim("and harm by at most 0.01", "main", _harm_at_most("distilled", 0.01)),
    Claim(
        "A learned metric gains more than router inputs as they are (both without null entries)",
        "main",
        _times("learned-metric", ("recommended-alone",), 1),
    ),
    Claim("and harms by at most 0.01", "main", _harm_at_most("learned-metric", 0.01)),
    Claim(
        "Votes of the neighbours that `boosted` finds for the last layer add to its gain",
        "together",
        _votes_add,
    ),
    Claim(
        "`recommended` chooses more right continuations (p < 0.05)",
        "choice",
        _chooses_better("recommended"),
    ),
    Claim("so does it with a step of 3.5", "choice", _chooses_better("recommended-3.5")),
    Claim("so does `boosted`", "choice", _chooses_better("boosted")),
    Claim("so does the paper's first reading", "choice", _chooses_better("paper")),
    Claim(
        "K = 1 gains most in the paper's first reading (RBF)",
        "neighbours",
        _best_on_dev("neighbours", 1, method="paper", similarity="rbf"),
    ),
    Claim(
        "RBF gains more than cosine (first reading, K = 1)",
        "neighbours",
        _best_on_dev("similarity", "rbf", method="paper", neighbours=1),
    ),
    Claim("Several steps gain nothing beyond one (first reading)", "steps", _steps_gain_nothing),
    Claim(
        "Hard sequences gain more than easy ones (thirds by the first half's loss, measured on the second)",
        "perplexity",
        _high_gains_more,
    ),
    Claim("The largest reference still adds to the gain", "size", _grows),
    *(
        Claim(
            f"Lookups chosen by {name} gain more than as many by chance (about half of them)",
            "selective",
            _better_than_chance(name),
        )
        for name in (
            "router entropy",
            "router margin",
            "previous token's loss",
            "first layer's lambda",
        )
    ),
    Claim("Labels by the model's own argmax gain", "pseudo-labels", _labels_gain("argmax")),
    Claim("filtered by confidence they do", "pseudo-labels", _labels_gain("argmax, p >= 0.9")),
    Claim("with a perfect judge they do", "pseudo-labels", _labels_gain("argmax, perfect judge")),
    Claim("Keys of 8 bits keep 99 % of the gain", "compression", _keeps("int8", 0.99)),
    Claim("Keys of 4 bits do", "compression", _keeps("int4", 0.99)),
    Claim("Keys of 1 bit do", "compression", _keeps("1 bit", 0.99)),
    Claim("An eighth of the principal components does", "compression", _keeps("PCA d/8", 0.99)),
)


@dataclass(frozen=True, slots=True)
class Answer:
    """A question, and the changes that answer it: means over studies, on the domain and on general text.

    Attributes:
        rows: what each is called, and the columns that it is found by.

    """

    question: str
    experiment: str
    rows: Sequence[tuple[str, Row]]

    def found(self, results: Sequence[Result]) -> list[tuple[str, int, float, float]]:
        """Name, studies, change on the domain and on general text, of what there are results of."""
        answers = list[tuple[str, int, float, float]]()
        for name, having in self.rows:
            rows = [
                row
                for result in of_experiment(results, self.experiment)
                for row in result.rows
                if all(row.get(column) == value for column, value in having.items())
            ]
            if rows:
                gain, harm = (_mean(rows, text) for text in ("domain", "general"))
                answers.append((name, len(rows), gain, harm))
        return answers


def _mean(rows: Sequence[Row], text: str) -> float:
    return float(fmean(row[text]["delta"] for row in rows))


_LABELS = ("truth", "argmax", "argmax, p >= 0.9", "4 of 5 draws agree", "argmax, perfect judge")
_KEYS = ("f32", "int8", "int4", "1 bit", "PCA d/4", "PCA d/8")
_SIGNALS = (
    *("chance", "router entropy", "router margin", "previous token's loss"),
    "first layer's lambda",
)
ANSWERS = (
    Answer(
        "Open question 1: can pseudo-labels stand in for ground truth? (`recommended`)",
        "pseudo-labels",
        [(name, {"method": "recommended", "labels": name}) for name in _LABELS],
    ),
    Answer(
        "Open question 2: how far can keys be quantized or reduced? (`recommended`)",
        "compression",
        [(name, {"method": "recommended", "keys": name, "values": "f32"}) for name in _KEYS],
    ),
    Answer(
        "Open question 3: is there a cheap proxy that says when to retrieve? (half of the lookups are made; by "
        "`first layer's lambda` more, for that layer always looks up)",
        "selective",
        [
            ("all lookups", {"signal": "all"}),
            *((name, {"signal": name, "rate": 0.5}) for name in _SIGNALS),
        ],
    ),
    Answer(
        "Next check 1: where does the gain come from?",
        "source",
        [
            ("all of the change", {"changed": "all"}),
            ("experts and proportions, at the model's own total", {"changed": "choice"}),
            ("proportions of the model's own experts", {"changed": "weights"}),
            ("their total weight alone", {"changed": "total"}),
            ("control: shuffled", {"changed": "shuffled"}),
            ("control: the mean delta", {"changed": "mean delta"}),
        ],
    ),
    Answer(
        "Next check 2: can harm be controlled, and what does that cost? (`recommended`, dev)",
        "lambda0",
        [
            (
                f"lambda0 {lambda0:g}, s0 {null:g}",
                {
                    "method": "recommended",
                    "lambda0": lambda0,
                    "null_weight": null,
                    "split": "dev",
                },
            )
            for lambda0, null in ((0.1, 0.5), (0.3, 0.5), (0.5, 0.5), (0.3, 2.0), (0.3, 4.0))
        ],
    ),
    Answer(
        "Next check 2, with general text in the memory, as a share of the reference (`recommended`, eta 2.25, test)",
        "null-entries",
        [
            ("none", {"values": "none", "split": "test"}),
            *(
                (
                    f"{share:g}, {said}",
                    {"values": values, "share": share, "eta": 2.25, "split": "test"},
                )
                for values, said in (
                    ("drawn", "changing nothing, drawn"),
                    ("chosen", "changing nothing, chosen"),
                    ("learned", "learned, drawn"),
                )
                for share in (0.25, 0.5, 1.0)
            ),
        ],
    ),
    Answer(
        "Next check 3: does a larger step gain more? (`recommended`, dev)",
        "step-size",
        [
            (
                f"eta {eta:g}",
                {"method": "recommended", "norm": "soft", "eta": eta, "split": "dev"},
            )
            for eta in (1.125, 2.25, 3.375, 4.5, 9.0)
        ],
    ),
    Answer(
        "Next check 3, with as many null entries, chosen (`recommended`, dev)",
        "null-entries",
        [
            (f"eta {eta:g}", {"values": "chosen", "share": 1.0, "eta": eta, "split": "dev"})
            for eta in (2.25, 3.0, 3.5, 4.0)
        ],
    ),
)
