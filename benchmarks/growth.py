"""How lookups and bytes grow: `python -m benchmarks.growth --json FILE`.

One number at a time goes up from a base: keys, dimension, K, tokens a lookup. A replica in this process and a sidecar
over a Unix socket take turns on the same keys.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import typer
from rich import box
from rich.table import Table

from benchmarks import report
from benchmarks.clustered import Workload, make_workload
from benchmarks.replicas import Layers, replica_lane, tensor_bytes
from benchmarks.sidecars import SidecarClient, build_layers
from benchmarks.timing import CacheSweep, Lane, batches, measure
from model_runner.progress import Progress
from model_runner.sidecar import running_sidecar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_EXPERTS, QUERIES = 64, 1024
REPLICA, REMOTE = "replica", "remote"
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Grid:
    """The base, and what each of its numbers goes up to. A million keys need a reduced d to fit in RAM."""

    keys: tuple[int, ...] = (2_000, 20_000, 200_000)
    dimensions: tuple[int, ...] = (128, 512, 2048)
    neighbours: tuple[int, ...] = (1, 8, 32)
    tokens: tuple[int, ...] = (1, 8, 64, 512)
    base_keys: int = 20_000
    base_dimension: int = 512

    def sizes(self) -> list[tuple[int, int]]:
        """(keys, dimension) of every memory."""
        across = [(keys, self.base_dimension) for keys in self.keys]
        across += [(self.base_keys, dimension) for dimension in self.dimensions]
        return sorted({*across, (self.base_keys, self.base_dimension)})

    def lookups(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """(K, tokens) that a memory of that size is asked: all at the base, the ends elsewhere."""
        if size == (self.base_keys, self.base_dimension):
            pairs = [(k, 1) for k in self.neighbours] + [(1, tokens) for tokens in self.tokens]
        else:
            pairs = [(1, 1), (1, self.tokens[-1])]
        return sorted(set(pairs))


QUICK = Grid((2_000, 20_000), (128, 512), (1, 32), (1, 64, 512))


@contextmanager
def remote(workload: Workload, directory: Path, progress: Progress) -> Iterator[SidecarClient]:
    """A sidecar of one indexed layer, behind a Unix socket."""
    socket = f"unix:{directory}/route.sock"
    with running_sidecar(directory / "data", directory / "service.log", socket) as target:
        build_layers(target, workload, 1, [0], progress)
        client = SidecarClient(target)
        try:
            yield client
        finally:
            client.close()


def remote_lane(client: SidecarClient, workload: Workload, k: int) -> Lane:
    """From router inputs in f16 to the blended logits."""

    def call(tokens: slice) -> None:
        client.streamed(client.request(workload.queries[tokens], workload.logits[tokens], k))

    return Lane(REMOTE, "stream unix", "f16", k, call)


def rows_of_size(
    size: tuple[int, int], grid: Grid, rounds: int, seed: int, progress: Progress
) -> list[Row]:
    """Both ways at one number of keys and dimension, for every K and number of tokens."""
    keys, dimension = size
    progress.say(f"{keys} keys of d = {dimension} ...")
    workload = make_workload(keys, dimension, QUERIES, 256, NUM_EXPERTS, seed)
    with tempfile.TemporaryDirectory(prefix="growth-") as made, ExitStack() as stack:
        client = stack.enter_context(remote(workload, Path(made), progress))
        stored, deltas = torch.from_numpy(workload.keys), torch.from_numpy(workload.deltas)
        layers = Layers.of([stored], [deltas], NUM_EXPERTS)
        remote_bytes = descendants_bytes(os.getpid())
        disk = sum(file.stat().st_size for file in Path(made).rglob("*") if file.is_file())
        cache, rows = CacheSweep(64), []
        for k, tokens in grid.lookups(size):
            lanes = [
                replica_lane(layers, workload, k, client.reading()),
                remote_lane(client, workload, k),
            ]
            repeats = max(2, rounds // (1 + tokens // 64))
            samples = measure(lanes, batches(QUERIES, tokens, repeats), cache.sweep, seed)
            for lane, found in zip(lanes, samples, strict=True):
                row = {"keys": keys, "dimension": dimension} | report.row(lane, tokens, found)
                here = tensor_bytes(layers.layers[0]) if lane.engine == REPLICA else remote_bytes
                row |= {"ram_bytes": here, "disk_bytes": disk}
                rows.append(row)
        cache.close()
    return rows


def descendants_bytes(process: int) -> int:
    """Resident bytes of all processes that a process started, and of those that they did."""
    parents: dict[int, int] = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            fields = (directory / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
        parents[int(directory.name)] = int(fields[1])
    found, wave = 0, [process]
    while wave:
        wave = [child for child, parent in parents.items() if parent in wave]
        found += sum(_resident_bytes(child) for child in wave)
    return found


def _resident_bytes(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * PAGE_BYTES
    except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
        return 0


def ratios_of(rows: Sequence[Row], grid: Grid) -> dict[str, float]:
    """Replica over remote of the same lookup, and time at each size over that at the base."""
    p50 = {_cell(row): row["p50_ms"] for row in rows}
    ratios = {}
    for engine, keys, dimension, k, tokens in p50:
        name = f"{keys} x {dimension}, K = {k}, {tokens} tokens"
        here = p50[engine, keys, dimension, k, tokens]
        if engine == REPLICA:
            ratios[f"replica over remote: {name}"] = here / p50[REMOTE, keys, dimension, k, tokens]
        if (keys, dimension) != (grid.base_keys, grid.base_dimension):
            base = p50[engine, grid.base_keys, grid.base_dimension, k, tokens]
            ratios[f"{engine} over base: {name}"] = here / base
    return ratios


def _cell(row: Row) -> tuple[str, int, int, int, int]:
    return row["engine"], row["keys"], row["dimension"], row["neighbours"], row["tokens"]


def run(grid: Grid, rounds: int, seed: int, progress: Progress) -> dict[str, Any]:
    """All sizes, one after the other; the document of a run."""
    load = report.load_average()
    rows = [
        row for size in grid.sizes() for row in rows_of_size(size, grid, rounds, seed, progress)
    ]
    settings = {name: getattr(grid, name) for name in grid.__slots__}
    settings |= {"rounds": rounds, "seed": seed}
    plain = {
        name: list(each) if isinstance(each, tuple) else each for name, each in settings.items()
    }
    return report.document("growth", plain, rows, ratios_of(rows, grid), load)


def table(rows: Sequence[Row]) -> Table:
    """A row per size, way, K and number of tokens."""
    made = Table(
        title="Time and bytes as a layer grows (replica and sidecar in turn)", box=box.SIMPLE
    )
    columns = ("keys", "dimension", "neighbours", "tokens", "engine", "p50_ms", "p99_ms", "n")
    for column in (*columns, "RAM MiB", "disk MiB"):
        made.add_column(column, justify="right")
    for row in rows:
        sizes = (f"{row[name] / 2**20:.0f}" for name in ("ram_bytes", "disk_bytes"))
        made.add_row(*(str(row[column]) for column in columns), *sizes)
    return made


def plot(rows: Sequence[Row]) -> Figure:
    """Time against each number, and bytes against the number of keys."""
    figure = report.new_figure(13, 3.4)
    axes = figure.subplots(1, 5)
    base = {name: _most_common([row[name] for row in rows]) for name in ("keys", "dimension")}
    panels = ("keys", "dimension", "neighbours", "tokens")
    for place, axis in zip(axes, panels, strict=False):
        fixed = base | {"neighbours": 1, "tokens": 1}
        del fixed[axis]
        _panel(place, [row for row in rows if fixed.items() <= row.items()], axis, "p50_ms")
    fixed = {"dimension": base["dimension"], "neighbours": 1, "tokens": 1}
    _panel(axes[-1], [row for row in rows if fixed.items() <= row.items()], "keys", "ram_bytes")
    axes[0].legend(fontsize=8)
    return figure


def _panel(axes: Any, rows: Sequence[Row], x: str, y: str) -> None:
    for engine in (REPLICA, REMOTE):
        mine = [row for row in rows if row["engine"] == engine]
        axes.plot([row[x] for row in mine], [row[y] for row in mine], "o-", label=engine)
    axes.set(xlabel=x, ylabel=y, xscale="log", yscale="log")
    axes.minorticks_off()
    at = sorted({row[x] for row in rows})
    axes.set_xticks(at, [str(number) for number in at], fontsize=8)
    most, least = max(row[y] for row in rows), min(row[y] for row in rows)
    axes.set_ylim(least / 3, most * 3)


def _most_common(numbers: Sequence[int]) -> int:
    found, counts = np.unique(numbers, return_counts=True)
    return int(found[counts.argmax()])


def main(
    json_file: report.JsonFile,
    keys: Annotated[list[int] | None, typer.Option(help="Numbers of keys.")] = None,
    dimension: Annotated[int, typer.Option(min=8, help="d where it does not grow.")] = 512,
    rounds: Annotated[int, typer.Option(min=2, help="Turns with one token.")] = 60,
    quick: Annotated[bool, typer.Option("--quick", help="The short set: four sizes.")] = False,
    plot_file: report.PlotFile = None,
    seed: report.Seed = 0,
    quiet: report.Quiet = False,
) -> None:
    """Measure time and bytes against keys, dimension, K and tokens; `--keys 1000000 --dimension 64` for a million."""
    grid = QUICK if quick else Grid(keys=tuple(keys or Grid().keys), base_dimension=dimension)
    made = run(grid, 30 if quick else rounds, seed, Progress(quiet=quiet))
    report.publish(made, report.Files(json_file, plot_file, quiet), table, plot)


if __name__ == "__main__":
    typer.run(main)
