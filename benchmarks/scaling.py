"""Bytes, RAM, nodes, cores and network of a routing memory, for docs/scaling.md: `python -m benchmarks.scaling`.

Computes from a file of measurements; --measure makes one, with real Qdrant Edge shards. --cluster measures lookups of a
Qdrant cluster, which is a table of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import qdrant, report, scaling_cluster
from benchmarks.scaling_cluster import ClusterPlan
from benchmarks.scaling_grid import Grid, placed, with_grids
from benchmarks.scaling_measure import Plan, measurements
from benchmarks.scaling_sizes import Measured
from benchmarks.scaling_tables import tables
from model_runner.progress import Progress

_RESULTS = Path(__file__).with_name("results")
MEASURED = _RESULTS / "scaling-2026-11-22.json"
ROUTES = _RESULTS / "route-2026-11-22.json"
_TABLE_WIDTH = 200


def grids(measured: Path = MEASURED, routes: Path = ROUTES) -> list[Grid]:
    """Every table, from the measurements of this program and of benchmarks.route."""
    content = json.loads(measured.read_text())
    found = [row for row in json.loads(routes.read_text())["rows"] if _is_counted(row)]
    return tables(Measured(content), found)


def _is_counted(row: dict[str, Any]) -> bool:
    what = (row["engine"], row["transport"], row["dtype"], row["neighbours"])
    return what == ("sidecar", "stream unix", "f16", 32)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables; measures, writes JSON, or brings a page up to date when asked to."""
    parser = argparse.ArgumentParser(prog="benchmarks.scaling", description=__doc__)
    parser.add_argument("--measured", type=Path, default=MEASURED, help="measurements to use")
    parser.add_argument("--measure", type=Path, help="measure first, into this file, and use it")
    parser.add_argument("--json", type=Path, help="the tables' numbers go here")
    parser.add_argument(
        "--markdown", action="store_true", help="print them as docs/scaling.md has them"
    )
    parser.add_argument("--page", type=Path, help="replace the tables of this page")
    parser.add_argument(
        "--cluster",
        nargs="?",
        const=qdrant.STANDIN,
        metavar="URL,URL,...",
        help="measure lookups of this cluster, or of the tests' stand-ins, instead of the tables",
    )
    parser.add_argument("--quick", action="store_true", help="a small grid of --cluster")
    given = parser.parse_args(arguments)
    if given.cluster:
        _measure_cluster(given)
        return
    if given.measure:
        content = measurements(Plan(), Progress())
        given.measure.write_text(json.dumps(content, indent=1) + "\n")
    made = grids(given.measure or given.measured)
    if given.json:
        given.json.write_text(json.dumps({g.name: g.records() for g in made}, indent=1) + "\n")
    if given.page:
        given.page.write_text(with_grids(given.page.read_text(), made))
    show(made, markdown=given.markdown)


def _measure_cluster(given: argparse.Namespace) -> None:
    plan = ClusterPlan().quick() if given.quick else ClusterPlan()
    found = list(scaling_cluster.rows(given.cluster, plan, Progress()))
    if given.json:
        about = {"machine": report.machine(), "load_average": report.load_average()}
        content = {"schema": 1, "cluster": given.cluster, "plan": asdict(plan), **about}
        given.json.write_text(json.dumps({**content, "rows": found}, indent=1) + "\n")
    show([scaling_cluster.grid(found)], markdown=given.markdown)


def show(made: Sequence[Grid], *, markdown: bool) -> None:
    """Prints tables, as pages have them or for a terminal."""
    if markdown:
        sys.stdout.write("\n\n".join(map(placed, made)) + "\n")
        return
    console = Console()
    console.width = max(console.width, _TABLE_WIDTH)  # a file has no width
    for grid in made:
        console.print(grid.table())


if __name__ == "__main__":
    main()
