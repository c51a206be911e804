"""Several runners of one sidecar: `python -m benchmarks.load --json FILE`.

Each runner is a process that looks up without pause over a stream of its own; all of them share the machine with the
service. Numbers of runners take turns, so that ratios to one runner are of one run.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich import box
from rich.table import Table

from benchmarks import report
from benchmarks.clustered import Workload, make_workload
from benchmarks.sidecars import SidecarClient, build_layers
from model_runner.progress import Progress
from model_runner.sidecar import running_sidecar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RUNNERS, QUICK_RUNNERS = (1, 2, 4, 8, 16), (1, 4, 16)
TOKENS = (1, 32)
NUM_EXPERTS, QUERIES = 64, 512
Row = dict[str, Any]


def look_up(target: str, shape: tuple[int, int, int], orders: Connection) -> None:
    """A runner: for each order (seconds, tokens a lookup) the ms of its lookups, until None comes."""
    keys, dimension, seed = shape
    workload = make_workload(keys, dimension, QUERIES, 1, NUM_EXPERTS, seed)
    client = SidecarClient(target)
    orders.send("ready")
    while (order := orders.recv()) is not None:
        seconds, tokens = order
        orders.send(_timed(client, workload, seconds, tokens))
    client.close()


def _timed(client: SidecarClient, workload: Workload, seconds: float, tokens: int) -> list[float]:
    requests = [
        client.request(
            workload.queries[start : start + tokens], workload.logits[start : start + tokens], 0
        )
        for start in range(0, QUERIES - tokens + 1, tokens)
    ]
    elapsed: list[float] = []
    give_up = time.perf_counter() + seconds
    while (started := time.perf_counter()) < give_up:
        client.streamed(requests[len(elapsed) % len(requests)])
        elapsed.append(1000 * (time.perf_counter() - started))
    return elapsed


@contextmanager
def runners(count: int, target: str, shape: tuple[int, int, int]) -> Iterator[list[Connection]]:
    """That many processes, connected; each has said that it is ready."""
    context = multiprocessing.get_context("spawn")
    ends: list[Connection] = []
    processes: list[BaseProcess] = []
    try:
        for _ in range(count):
            here, there = context.Pipe()
            process: BaseProcess = context.Process(
                target=look_up, args=(target, shape, there), daemon=True
            )
            process.start()
            there.close()
            ends.append(here)
            processes.append(process)
        for end in ends:
            end.recv()
        yield ends
        for end in ends:
            end.send(None)
    finally:
        for process in processes:
            process.join(10)
            process.kill()


def take_turns(
    ends: Sequence[Connection], levels: Sequence[int], rounds: int, seconds: float, seed: int
) -> dict[tuple[int, int], list[list[float]]]:
    """By (runners, tokens): the ms of all lookups of each round."""
    rng = np.random.default_rng(seed)
    cells = [(count, tokens) for count in levels for tokens in TOKENS]
    found: dict[tuple[int, int], list[list[float]]] = {cell: [] for cell in cells}
    for _ in range(rounds):
        for index in rng.permutation(len(cells)):
            count, tokens = cells[index]
            for end in ends[:count]:
                end.send((seconds, tokens))
            found[count, tokens].append([ms for end in ends[:count] for ms in end.recv()])
    return found


def rows_of(found: dict[tuple[int, int], list[list[float]]], seconds: float) -> list[Row]:
    """A row per number of runners and tokens."""
    return [
        {
            "runners": count,
            "tokens": tokens,
            "lookups_per_s": round(float(np.median([len(ms) for ms in rounds])) / seconds, 1),
            "p50_ms": round(float(np.median(np.concatenate(rounds))), 3),
            "p99_ms": round(float(np.quantile(np.concatenate(rounds), 0.99)), 3),
            "n": sum(map(len, rounds)),
        }
        for (count, tokens), rounds in found.items()
    ]


def ratios_of(rows: Sequence[Row]) -> dict[str, float]:
    """Of one runner: time per lookup of all together, and the p99."""
    ratios = {}
    one = {row["tokens"]: row for row in rows if row["runners"] == 1}
    for row in rows:
        alone, name = one[row["tokens"]], f"{row['runners']} runners, {row['tokens']} tokens"
        if row is not alone:
            ratios[f"time per lookup: {name}"] = alone["lookups_per_s"] / row["lookups_per_s"]
            ratios[f"p99: {name}"] = row["p99_ms"] / alone["p99_ms"]
    return ratios


def run(settings: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Fills a sidecar, measures; the document of a run."""
    load = report.load_average()
    shape = settings["keys"], settings["dimension"], settings["seed"]
    workload = make_workload(*shape[:2], QUERIES, QUERIES, NUM_EXPERTS, settings["seed"])
    with tempfile.TemporaryDirectory(prefix="load-") as made:
        data, socket = Path(made) / "data", f"unix:{made}/route.sock"
        with running_sidecar(data, Path(made) / "service.log", socket) as target:
            build_layers(target, workload, 1, [0], progress)
            progress.say(f"{max(settings['runners'])} runners ...")
            with runners(max(settings["runners"]), target, shape) as ends:
                timing = settings["rounds"], settings["seconds"], settings["seed"]
                found = take_turns(ends, settings["runners"], *timing)
    rows = rows_of(found, settings["seconds"])
    return report.document("load", settings, rows, ratios_of(rows), load)


def table(rows: Sequence[Row]) -> Table:
    """A row per number of runners and tokens."""
    made = Table(title="Runners of one sidecar, each without pause", box=box.SIMPLE)
    columns = ("runners", "tokens", "lookups_per_s", "p50_ms", "p99_ms", "n")
    for column in columns:
        made.add_column(column, justify="right")
    for row in rows:
        made.add_row(*(str(row[column]) for column in columns))
    return made


def plot(rows: Sequence[Row]) -> Figure:
    """Throughput and latency against the number of runners."""
    figure = report.new_figure(9, 3.5)
    throughput, latency = figure.subplots(1, 2)
    for tokens in TOKENS:
        mine = [row for row in rows if row["tokens"] == tokens]
        at = [row["runners"] for row in mine]
        throughput.plot(
            at, [row["lookups_per_s"] * tokens for row in mine], "o-", label=f"{tokens} tokens"
        )
        for name, style in (("p50_ms", "o-"), ("p99_ms", "s--")):
            latency.plot(
                at, [row[name] for row in mine], style, label=f"{tokens} tokens, {name[:3]}"
            )
    for axes, name in ((throughput, "tokens a second"), (latency, "ms a lookup")):
        axes.set(xlabel="runners", ylabel=name, xscale="log", yscale="log")
        axes.set_xticks([row["runners"] for row in mine], [str(row["runners"]) for row in mine])
        axes.legend(fontsize=8)
    return figure


def main(
    json_file: report.JsonFile,
    keys: Annotated[int, typer.Option(min=100, help="Entries of the layer.")] = 20_000,
    dimension: Annotated[int, typer.Option(min=2, help="Hidden size d.")] = 2048,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every number of runners.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.01, help="Of one turn.")] = 2.0,
    quick: Annotated[
        bool, typer.Option("--quick", help="The short set: d = 512, few rounds.")
    ] = False,
    plot_file: report.PlotFile = None,
    seed: report.Seed = 0,
    quiet: report.Quiet = False,
) -> None:
    """Measure 1 to 16 runners of one sidecar."""
    settings = {
        "keys": keys,
        "dimension": 512 if quick else dimension,
        "rounds": 2 if quick else rounds,
        "seconds": 1.0 if quick else seconds,
        "runners": list(QUICK_RUNNERS if quick else RUNNERS),
        "seed": seed,
    }
    made = run(settings, Progress(quiet=quiet))
    report.publish(made, report.Files(json_file, plot_file, quiet), table, plot)


if __name__ == "__main__":
    typer.run(main)
