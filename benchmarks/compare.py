"""What became slower than the stored baseline: `python -m benchmarks.compare RESULT...`.

The baseline holds ratios only, each of one run and of arms that took turns, so that it means something on another
machine than the one that it was measured on. Lower is better in all of them. Exit code 1: a ratio is above its
baseline by more than the tolerance, or gone; 2: there is nothing to compare.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

BASELINE = Path(__file__).with_name("results") / "baseline.json"
# Of ratios of processor time from short runs on a machine that others use too (benchmarks/README.md).
TOLERANCE = 0.1
EXIT_SLOWER, EXIT_NOT_COMPARABLE = 1, 2
SLOWER, FASTER, SAME, NEW, GONE = "slower", "faster", "", "new", "gone"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class NotComparable(ValueError):
    """A result that the baseline says nothing about; the message says why, and the remedy."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One ratio beside its baseline; None where there is none."""

    benchmark: str
    name: str
    baseline: float | None
    now: float | None
    word: str

    @property
    def fails(self) -> bool:
        """Whether the exit code says so."""
        return self.word in (SLOWER, GONE)


def verdicts(
    result: Mapping[str, Any], baseline: Mapping[str, Any], tolerance: float
) -> Iterator[Verdict]:
    """Every ratio of a result, then those of the baseline that it lacks. Raises NotComparable."""
    benchmark = result["benchmark"]
    if benchmark not in baseline:
        raise NotComparable(
            f"{benchmark}: not in the baseline, which has {', '.join(sorted(baseline))}; "
            "store it with --update"
        )
    kept = baseline[benchmark]
    if differing := _differing(kept["settings"], result["settings"]):
        raise NotComparable(
            f"{benchmark}: measured with other settings than the baseline ({differing}); "
            "run it with the baseline's, or store this one with --update"
        )
    before, now = kept["ratios"], result["ratios"]
    for name, ratio in now.items():
        then = before.get(name)
        yield Verdict(benchmark, name, then, ratio, _word(then, ratio, tolerance))
    for name in before.keys() - now.keys():
        yield Verdict(benchmark, name, before[name], None, GONE)


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    names = sorted(before.keys() | now.keys())
    return ", ".join(
        f"{name}: {before.get(name)} then, {now.get(name)} now"
        for name in names
        if before.get(name) != now.get(name)
    )


def _word(before: float | None, now: float, tolerance: float) -> str:
    if before is None:
        return NEW
    if now > before * (1 + tolerance):
        return SLOWER
    return FASTER if now < before / (1 + tolerance) else SAME


def updated(baseline: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The baseline with these results in place of its own; other benchmarks stay as they are."""
    kept = ("date", "machine", "settings", "ratios")
    new = {result["benchmark"]: {name: result[name] for name in kept} for result in results}
    return dict(sorted({**baseline, **new}.items()))


def table(found: Sequence[Verdict]) -> Table:
    """Those that differ, and how many do not."""
    same = sum(each.word == SAME for each in found)
    made = Table(title=f"{same} of {len(found)} ratios as before", box=box.SIMPLE)
    for column in ("benchmark", "ratio"):
        made.add_column(column, no_wrap=True)
    for column in ("baseline", "now", ""):
        made.add_column(column, justify="right")
    for each in found:
        if each.word != SAME:
            numbers = ("" if n is None else f"{n:.3f}" for n in (each.baseline, each.now))
            made.add_row(each.benchmark, each.name, *numbers, each.word)
    return made


@app.command()
def main(
    results: Annotated[list[Path], typer.Argument(help="JSON files of benchmarks.")],
    baseline_file: Annotated[
        Path, typer.Option("--baseline", help="The stored ratios.")
    ] = BASELINE,
    tolerance: Annotated[
        float, typer.Option(min=0, help="A ratio may be above its baseline by this share of it.")
    ] = TOLERANCE,
    update: Annotated[
        bool, typer.Option("--update", help="Store these results as the baseline instead.")
    ] = False,
) -> None:
    """Compare results with the baseline; exit code 1 when something became slower."""
    read = [json.loads(file.read_text()) for file in results]
    baseline = json.loads(baseline_file.read_text()) if baseline_file.exists() else {}
    if update:
        baseline_file.write_text(json.dumps(updated(baseline, read), indent=1) + "\n")
        return
    try:
        found = [each for result in read for each in verdicts(result, baseline, tolerance)]
    except NotComparable as error:
        typer.echo(f"benchmarks.compare: {error}", err=True)
        raise typer.Exit(EXIT_NOT_COMPARABLE) from error
    console = Console()
    console.width = max(console.width, 110)  # a file has no width
    console.print(table(found))
    if any(each.fails for each in found):
        raise typer.Exit(EXIT_SLOWER)


if __name__ == "__main__":
    app()
