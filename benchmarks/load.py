"""Several runners of one sidecar: `python -m benchmarks.load --json FILE`.

Each runner is a process that looks up without pause, in the sidecar over a stream of its own or in a replica that
follows it, at rest and while a client replaces entries without pause. All of them share the machine with the service.
Numbers of runners take turns, so that ratios to one runner are of one run.
"""

from __future__ import annotations

import math
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from knnmoe.client import AdminClient, RoutingClient
from rich import box
from rich.table import Table

from benchmarks import report
from benchmarks.clustered import Workload, make_workload
from benchmarks.sidecars import (
    MEMORY,
    TIMEOUT_S,
    build_layers,
    fingerprint_of,
    upsert_request,
)
from model_runner.progress import Progress
from model_runner.sidecar import running_sidecar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REMOTE, REPLICA, WRITTEN = "sidecar", "replica", "replica, written to"
RUNNERS, QUICK_RUNNERS = (1, 2, 4, 8, 16), (1, 4, 16)
REPLICAS, QUICK_REPLICAS = (1, 2, 4), (1, 4)
TOKENS = (1, 32)
NUM_EXPERTS, QUERIES = 64, 512
# What a client that learns example by example sends at a time.
ENTRIES_PER_WRITE = 64
JOIN_TIMEOUT_S = 10.0
Row = dict[str, Any]
Cell = tuple[str, int, int]  # where, runners, tokens
Lookup = Callable[[slice], object]


def look_up(target: str, workload: Workload, orders: Connection) -> None:
    """A runner of the sidecar."""
    fingerprint = fingerprint_of(workload, 1).message()
    with RoutingClient(target, MEMORY, fingerprint) as client:

        def lookup(tokens: slice) -> object:
            inputs, logits = workload.queries[tokens], workload.logits[tokens]
            return client.route(0, inputs, logits, timeout_s=TIMEOUT_S)

        _obey(orders, lookup)


def follow(target: str, workload: Workload, orders: Connection) -> None:
    """A runner with a replica, on one thread; it goes on when the sidecar is away."""
    import torch

    from model_runner.architectures.families import Assignment
    from model_runner.replica.first_pass import CodedFirstPass
    from model_runner.replica.retriever import ReplicaRetriever
    from model_runner.retrieval import Retrieval, open_retriever

    torch.set_num_threads(1)
    with AdminClient(target) as client:
        layers = client.describe(MEMORY).fingerprint.num_layers
    inputs, logits = torch.from_numpy(workload.queries), torch.from_numpy(workload.logits)
    own = Assignment(torch.zeros(QUERIES, 1), torch.zeros(QUERIES, 1, dtype=torch.int64))
    opened = open_retriever(
        target,
        MEMORY,
        fingerprint_of(workload, layers),
        torch.device("cpu"),
        Retrieval("replica", max_staleness_s=math.inf),
        on_error="raise",
    )
    with opened as memory:

        def lookup(tokens: slice) -> object:
            mine = Assignment(own.weights[tokens], own.experts[tokens])
            return memory.retriever.lookup(0, inputs[tokens], logits[tokens], mine)

        for start in range(QUERIES):  # from which a first pass is learned
            lookup(slice(start, start + 1))
        assert isinstance(memory.retriever, ReplicaRetriever)  # it was asked for
        if isinstance(first_pass := memory.retriever.copy.layers[0].first_pass, CodedFirstPass):
            first_pass.wait()
        _obey(orders, lookup)


class RunnerFailed(Exception):
    """A runner's process failed; says why."""


def ordered(end: Connection, order: tuple[float, int] | None) -> None:
    """Gives a runner an order; that it is gone received() says."""
    with suppress(OSError):
        end.send(order)


def received(end: Connection) -> Any:
    """What a runner sends next. Raises RunnerFailed."""
    try:
        found = end.recv()
    except (EOFError, OSError):
        raise RunnerFailed("a runner's process was ended") from None
    if isinstance(found, RunnerFailed):
        raise found
    return found


def _run(
    of: Callable[[str, Workload, Connection], None],
    target: str,
    workload: Workload,
    orders: Connection,
) -> None:
    """A runner's process: its failure is the last that it sends."""
    try:
        of(target, workload, orders)
    except Exception as error:  # noqa: BLE001  # whatever it is, the benchmark says it
        with suppress(OSError):  # nobody listens any more
            orders.send(RunnerFailed(f"{of.__name__}: {type(error).__name__}: {error}"))


def _obey(orders: Connection, lookup: Lookup) -> None:
    """For each order (seconds, tokens a lookup) the ms of the lookups, until None comes."""
    lookup(slice(0, 1))  # connects
    orders.send("ready")
    while (order := orders.recv()) is not None:
        seconds, tokens = order
        starts = range(0, QUERIES - tokens + 1, tokens)
        elapsed: list[float] = []
        give_up = time.perf_counter() + seconds
        while (started := time.perf_counter()) < give_up:
            start = starts[len(elapsed) % len(starts)]
            lookup(slice(start, start + tokens))
            elapsed.append(1000 * (time.perf_counter() - started))
        orders.send(elapsed)


@contextmanager
def runners(
    count: int, of: Callable[[str, Workload, Connection], None], target: str, workload: Workload
) -> Iterator[list[Connection]]:
    """That many processes, connected; each has said that it is ready."""
    context = multiprocessing.get_context("spawn")
    ends: list[Connection] = []
    processes: list[BaseProcess] = []
    try:
        for _ in range(count):
            here, there = context.Pipe()
            process: BaseProcess = context.Process(
                target=_run, args=(of, target, workload, there), daemon=True
            )
            process.start()
            there.close()
            ends.append(here)
            processes.append(process)
        for end in ends:
            received(end)
        yield ends
        for end, process in zip(ends, processes, strict=True):
            ordered(end, None)
            process.join(JOIN_TIMEOUT_S)
    finally:
        for process in processes:
            process.kill()


@contextmanager
def writing(target: str, workload: Workload) -> Iterator[None]:
    """Within it a client replaces the layer's entries by themselves, some at a time, without pause."""
    done = threading.Event()

    def write() -> None:
        with AdminClient(target, TIMEOUT_S) as client, client.upserter() as upserter:
            digest = client.describe(MEMORY).model_digest
            at = 0
            while not done.is_set():
                rows = slice(at, at + ENTRIES_PER_WRITE)
                upserter.send(upsert_request(digest, workload, 0, rows))
                at = rows.stop if rows.stop < len(workload.ids) else 0
            upserter.finish()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        yield
    finally:
        done.set()
        writer.join()


def take_turns(
    pools: Mapping[str, Sequence[Connection]],
    cells: Sequence[Cell],
    turns: tuple[int, float, int],
    write: Callable[[], Any],
) -> dict[Cell, list[list[float]]]:
    """By cell: the ms of all lookups of each round. `turns`: rounds, seconds of each, seed of their order."""
    rounds, seconds, seed = turns
    rng = np.random.default_rng(seed)
    found: dict[Cell, list[list[float]]] = {cell: [] for cell in cells}
    for _ in range(rounds):
        for index in rng.permutation(len(cells)):
            where, count, tokens = cells[index]
            ends = pools[where][:count]
            with write() if where == WRITTEN else nullcontext():
                for end in ends:
                    ordered(end, (seconds, tokens))
                found[cells[index]].append([ms for end in ends for ms in received(end)])
    return found


def rows_of(found: dict[Cell, list[list[float]]], seconds: float) -> list[Row]:
    """A row per way, number of runners and tokens."""
    return [
        {
            "where": where,
            "runners": count,
            "tokens": tokens,
            "lookups_per_s": round(float(np.median([len(ms) for ms in rounds])) / seconds, 1),
            "p50_ms": round(float(np.median(np.concatenate(rounds))), 3),
            "p99_ms": round(float(np.quantile(np.concatenate(rounds), 0.99)), 3),
            "n": sum(map(len, rounds)),
        }
        for (where, count, tokens), rounds in found.items()
    ]


def ratios_of(rows: Sequence[Row]) -> dict[str, float]:
    """Of one runner of the same way (at rest): time per lookup of all together, and the p99."""
    ratios = {}
    one = {(row["where"], row["tokens"]): row for row in rows if row["runners"] == 1}
    for row in rows:
        alone = one[REPLICA if row["where"] == WRITTEN else row["where"], row["tokens"]]
        name = f"{row['where']}, {row['runners']} runners, {row['tokens']} tokens"
        if row is not alone:
            ratios[f"time per lookup: {name}"] = alone["lookups_per_s"] / row["lookups_per_s"]
            ratios[f"p99: {name}"] = row["p99_ms"] / alone["p99_ms"]
    return ratios


def run(settings: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Fills a sidecar, measures; the document of a run."""
    load = report.load_average()
    shape = settings["keys"], settings["dimension"]
    workload = make_workload(*shape, QUERIES, QUERIES, NUM_EXPERTS, settings["seed"])
    levels = {
        REMOTE: settings["runners"],
        REPLICA: settings["replicas"],
        WRITTEN: settings["replicas"],
    }
    cells = [(where, n, tokens) for where, ns in levels.items() for n in ns for tokens in TOKENS]
    with tempfile.TemporaryDirectory(prefix="load-") as made, ExitStack() as stack:
        data, socket = Path(made) / "data", f"unix:{made}/route.sock"
        log = Path(made) / "service.log"
        target = stack.enter_context(running_sidecar(data, log, socket))
        build_layers(target, workload, 1, [0], progress)
        progress.say(
            f"{max(settings['runners'])} runners, {max(settings['replicas'])} replicas ..."
        )
        pools = {
            where: stack.enter_context(runners(max(levels[where]), of, target, workload))
            for where, of in ((REMOTE, look_up), (REPLICA, follow))
        }
        pools[WRITTEN] = pools[REPLICA]
        turns = settings["rounds"], settings["seconds"], settings["seed"]
        found = take_turns(pools, cells, turns, lambda: writing(target, workload))
    rows = rows_of(found, settings["seconds"])
    return report.document("load", settings, rows, ratios_of(rows), load)


def table(rows: Sequence[Row]) -> Table:
    """A row per number of runners and tokens."""
    made = Table(title="Runners of one sidecar, each without pause", box=box.SIMPLE)
    made.add_column("where", no_wrap=True)
    columns = ("runners", "tokens", "lookups_per_s", "p50_ms", "p99_ms", "n")
    for column in columns:
        made.add_column(column, justify="right")
    for row in rows:
        made.add_row(row["where"], *(str(row[column]) for column in columns))
    return made


def plot(rows: Sequence[Row]) -> Figure:
    """Throughput and latency against the number of runners."""
    figure = report.new_figure(9, 3.5)
    throughput, latency = figure.subplots(1, 2)
    for where in (REMOTE, REPLICA, WRITTEN):
        mine = [row for row in rows if row["where"] == where and row["tokens"] == 1]
        at = [row["runners"] for row in mine]
        throughput.plot(at, [row["lookups_per_s"] for row in mine], "o-", label=where)
        [line] = latency.plot(at, [row["p50_ms"] for row in mine], "o-", label=f"{where}, p50")
        p99 = [row["p99_ms"] for row in mine]
        latency.plot(at, p99, "s--", color=line.get_color(), label=f"{where}, p99")
    counts = sorted({row["runners"] for row in rows})
    for axes, name in ((throughput, "lookups of one token a second"), (latency, "ms a lookup")):
        axes.set(xlabel="runners", ylabel=name, xscale="log", yscale="log")
        axes.set_xticks(counts, [str(count) for count in counts])
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
        "replicas": list(QUICK_REPLICAS if quick else REPLICAS),
        "seed": seed,
    }
    made = run(settings, Progress(quiet=quiet))
    report.publish(made, report.Files(json_file, plot_file, quiet), table, plot)


if __name__ == "__main__":
    typer.run(main)
