"""What retrieval adds to a model's own time: `python -m benchmarks.end_to_end --json FILE`.

An OLMoE of the real layer shape decodes and prefills, with nothing, with a hook that changes nothing, with a replica,
with a sidecar over TCP and over a Unix socket, and with FAISS behind the same hook. The arms take turns within one run;
what an arm adds is the median of its paired ratios to the plain model on the same tokens.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import typer
from knnmoe.v1.types_pb2 import MemorySettings
from rich import box
from rich.table import Table

from benchmarks import report
from benchmarks.lanes import FAISS_FLAT, import_faiss
from benchmarks.olmoe import (
    DECODED,
    MEMORY,
    Entries,
    Pass,
    Passes,
    Remote,
    Shape,
    fill,
    make_entries,
    make_model,
)
from benchmarks.peers import KINDS, FaissRetriever, faiss_indexes
from benchmarks.replicas import Layers, settings_of, settle
from model_runner.architectures.families import Assignment
from model_runner.fingerprint import model_fingerprint
from model_runner.progress import Progress
from model_runner.replica.retriever import ReplicaRetriever
from model_runner.retrieval import Retrieval, open_retriever
from model_runner.router_hooks import Policy, RouterCall
from model_runner.routing_policy import RetrievalPolicy
from model_runner.sidecar import running_sidecar

PLAIN, OLD_PLAIN = "plain", "old: plain"
NEIGHBOURS = (1, 32)
CACHE = Path.home() / ".cache" / "knn-moe" / "benchmarks"
# Rounds of a pass; DECODED tokens each where it decodes.
Plan = Sequence[tuple[Pass, int]]
FULL: Plan = (
    (Pass("decode", 1, 512), 12),
    (Pass("decode", 8, 512), 4),
    (Pass("prefill", 1, 512), 8),
    (Pass("prefill", 8, 512), 2),
)
QUICK: Plan = (
    (Pass("decode", 1, 512), 6),
    (Pass("decode", 8, 512), 1),
    (Pass("prefill", 1, 512), 3),
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Arm:
    """A way to run the model; `run` gives the nanoseconds of a pass, `beside` is what it is compared with."""

    name: str
    run: Callable[[Pass, int], list[int]]
    layers: int = 0  # that retrieve
    beside: str = PLAIN


def identity(call: RouterCall) -> Assignment:
    """The model's own assignment, given back."""
    return Assignment(call.weights, call.experts)


@dataclass(slots=True)
class Bench:
    """What arms are made from."""

    model: torch.nn.Module
    shape: Shape
    entries: Entries
    passes: Passes
    cache: Path
    progress: Progress
    peers: Sequence[str] = KINDS

    def arm(
        self,
        name: str,
        policy: Policy | None,
        layers: int = 0,
        before: Callable[[], None] = lambda: None,
    ) -> Arm:
        """An arm in this process; `before` is not timed."""

        def run(what: Pass, number: int) -> list[int]:
            before()
            return self.passes.run(what, number, policy)

        return Arm(name, run, layers)


def peer_arms(bench: Bench) -> list[Arm]:
    """FAISS in this process; none, with a line, where it is not installed."""
    try:
        faiss = import_faiss()
    except ImportError as error:
        bench.progress.say(f"without its arms: {error}")
        return []
    cache = bench.cache / ("faiss-" + "-".join(map(str, asdict(bench.shape).values())))
    arms = []
    for kind in bench.peers:
        indexes = faiss_indexes(faiss, kind, bench.entries, cache, bench.progress)
        for k in NEIGHBOURS if kind == FAISS_FLAT else (1,):
            policy = RetrievalPolicy(FaissRetriever(indexes, bench.entries, k))
            arms.append(bench.arm(f"{kind}, K = {k}", policy, bench.shape.layers))
    return arms


def replica_arms(bench: Bench) -> list[Arm]:
    """Both kinds of memory in a replica; with four layers and more, its last quarter too."""
    entries, shape = bench.entries, bench.shape
    deltas = Layers.of(entries.keys, entries.deltas, shape.experts)
    assignments = Layers.of(entries.keys, entries.assignments, shape.experts)
    wanted: list[tuple[str, Layers, MemorySettings]] = [
        (f"replica, K = {k}", deltas, settings_of(k, entries.gammas)) for k in NEIGHBOURS
    ]
    if shape.layers >= 4:
        last = range(shape.layers - shape.layers // 4, shape.layers)
        settings = settings_of(1, entries.gammas, layers=last)
        wanted.append(("replica, K = 1, last quarter", deltas, settings))
    for support in ("top-k", "union"):
        settings = settings_of(1, entries.gammas, values="assignments", union=support == "union")
        wanted.append((f"replica, assignments ({support}), K = 1", assignments, settings))
    arms = []
    for name, layers, each in wanted:
        bench.progress.say(f"{name} ...")
        retriever = layers.read_by(each)
        for layer, plans in settle(retriever, entries.held_out).items():
            bench.progress.say(
                f"layer {layer}: {plans.get(each.neighbours, 'every row is scanned')}"
            )
        policy = RetrievalPolicy(retriever)
        arms.append(bench.arm(name, policy, len(each.layers) or shape.layers))
    return arms


@contextmanager
def remote_arms(bench: Bench, directory: Path) -> Iterator[list[Arm]]:
    """Two sidecars over copies of the same files, one behind a Unix socket and one behind TCP."""
    first, second, socket = directory / "unix", directory / "tcp", f"unix:{directory}/route.sock"
    bench.progress.say("filling a sidecar ...")
    with running_sidecar(first, directory / "fill.log") as target:
        fill(target, bench.model, bench.entries)
    shutil.copytree(first, second)
    with ExitStack() as stack:
        unix = stack.enter_context(running_sidecar(first, directory / "unix.log", socket))
        tcp = stack.enter_context(running_sidecar(second, directory / "tcp.log"))
        arms = []
        for transport, target, wanted in (("unix", unix, NEIGHBOURS), ("tcp", tcp, (1,))):
            remote = Remote.of(target, bench.model)
            stack.callback(remote.close)
            for k in wanted:
                before = _reading(remote, k)
                name = f"remote {transport}, K = {k}"
                arms.append(bench.arm(name, remote.policy, bench.shape.layers, before))
            if transport == "unix":
                arms.append(stack.enter_context(_followed(bench, remote)))
        yield arms


@contextmanager
def _followed(bench: Bench, remote: Remote) -> Iterator[Arm]:
    """A replica that follows the sidecar which the remote arm asks, and its settings with it."""
    fingerprint, how = model_fingerprint(bench.model), Retrieval("replica")
    device = torch.device("cpu")
    with open_retriever(
        remote.target, MEMORY, fingerprint, device, how, bench.progress, on_error="raise"
    ) as opened:

        def before() -> None:
            remote.read(1)
            opened.catch_up()

        before()
        assert isinstance(opened.retriever, ReplicaRetriever)
        settle(opened.retriever, bench.entries.held_out)
        policy = RetrievalPolicy(opened.retriever)
        yield bench.arm("replica (followed), K = 1", policy, bench.shape.layers, before)


def _reading(remote: Remote, neighbours: int) -> Callable[[], None]:
    return lambda: remote.read(neighbours)


@contextmanager
def old_arms(bench: Bench, checkout: Path, directory: Path) -> Iterator[list[Arm]]:
    """The remote way over a Unix socket of another checkout: its client, its service, a model of its own."""
    there = os.environ | {"PYTHONPATH": f"{checkout}{os.pathsep}{checkout / 'protos'}"}
    address = f"unix:{directory}/old.sock"
    serve = [sys.executable, "-m", "router_service", "serve", "--data", str(directory / "old")]
    worker = [sys.executable, str(Path(__file__).with_name("olmoe.py")), "--target", address]
    worker += ["--shape", json.dumps(asdict(bench.shape)), "--cache", str(bench.cache)]
    worker += ["--threads", str(torch.get_num_threads())]
    bench.progress.say(f"filling a sidecar of {checkout} ...")
    with (directory / "old.log").open("w") as log, ExitStack() as stack:
        sidecar = subprocess.Popen(
            [*serve, "--listen", address],
            env=there,
            cwd=checkout,  # -m looks there first
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        stack.callback(sidecar.wait)
        stack.callback(sidecar.terminate)
        _expect(sidecar, "listening on")
        process = subprocess.Popen(
            worker,
            env=there,
            cwd=checkout,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        stack.enter_context(process)
        assert process.stdin is not None
        stack.callback(process.stdin.close)
        _expect(process, "ready")
        yield [
            _worker_arm(process, name, k)
            for name, k in (
                (OLD_PLAIN, 0),
                *((f"old: remote unix, K = {k}", k) for k in NEIGHBOURS),
            )
        ]


def _expect(process: subprocess.Popen[str], start: str) -> None:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line.startswith(start):
        raise RuntimeError(f"{process.args!r}: got {line!r}, expected {start!r}")


def _worker_arm(process: subprocess.Popen[str], name: str, neighbours: int) -> Arm:
    def run(what: Pass, number: int) -> list[int]:
        assert process.stdin is not None
        assert process.stdout is not None
        asked = {"pass": asdict(what), "number": number, "neighbours": neighbours}
        process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.flush()
        answer: list[int] = json.loads(process.stdout.readline())
        return answer

    return Arm(name, run, 0 if name == OLD_PLAIN else -1, OLD_PLAIN)


def take_turns(
    arms: Sequence[Arm], plan: Plan, seed: int, progress: Progress
) -> dict[Pass, dict[str, list[int]]]:
    """Nanoseconds by pass and arm; every arm in every round, in a shuffled order. The first round warms up."""
    rng = np.random.default_rng(seed)
    found: dict[Pass, dict[str, list[int]]] = {}
    for what, rounds in plan:
        times: dict[str, list[int]] = {arm.name: [] for arm in arms}
        for number in progress.track(range(rounds + 1), what.name, "rounds"):
            for index in rng.permutation(len(arms)):
                elapsed = arms[index].run(what, number)
                if number:
                    times[arms[index].name] += elapsed
        found[what] = times
    return found


def rows_of(arms: Sequence[Arm], found: dict[Pass, dict[str, list[int]]], layers: int) -> list[Row]:
    """A row per pass and arm: ms, and what is added to the plain model, in all and per layer that retrieves."""
    rows = []
    for what, times in found.items():
        for arm in arms:
            ms, beside = (np.array(times[name]) / 1e6 for name in (arm.name, arm.beside))
            ratios = ms / beside
            asked = layers if arm.layers < 0 else arm.layers
            rows.append(
                {
                    "pass": what.name,
                    "tokens": what.tokens * what.batch if what.kind == "prefill" else what.batch,
                    "arm": arm.name,
                    "p50_ms": round(float(np.median(ms)), 3),
                    "min_ms": round(float(ms.min()), 3),
                    "ratio": round(float(np.median(ratios)), 4),
                    "ratio_quartiles": np.quantile(ratios, [0.25, 0.75]).round(4).tolist(),
                    "ratio_of_minima": round(float(ms.min() / beside.min()), 4),
                    "added_ms_per_layer": round(float(np.median(ms - beside)) / max(1, asked), 3),
                    "layers": asked,
                    "n": len(ms),
                }
            )
    return rows


def ratios_of(rows: Sequence[Row]) -> dict[str, float]:
    """Time of every arm over the plain model's."""
    retrieving = [row for row in rows if row["arm"] not in (PLAIN, OLD_PLAIN)]
    return {f"{row['pass']}: {row['arm']}": row["ratio"] for row in retrieving}


def table(rows: Sequence[Row]) -> Table:
    """A section per pass."""
    made = Table(
        title="Arms in turn, paired with the plain model on the same tokens", box=box.SIMPLE
    )
    for column in ("pass", "arm"):
        made.add_column(column, no_wrap=True)
    for column in ("p50 ms", "added %", "quartiles", "of minima %", "ms a layer", "n"):
        made.add_column(column, justify="right")
    for previous, row in zip([None, *rows], rows, strict=False):
        if previous is not None and previous["pass"] != row["pass"]:
            made.add_section()
        quartiles = " to ".join(f"{_percent(each):+.1f}" for each in row["ratio_quartiles"])
        made.add_row(
            row["pass"],
            row["arm"],
            f"{row['p50_ms']:.1f}",
            f"{_percent(row['ratio']):+.1f}",
            quartiles,
            f"{_percent(row['ratio_of_minima']):+.1f}",
            f"{row['added_ms_per_layer']:+.2f}",
            str(row["n"]),
        )
    return made


def _percent(ratio: float) -> float:
    return 100 * (ratio - 1)


def plot(rows: Sequence[Row]) -> Figure:
    """What each arm adds, a panel per pass."""
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    arms = [row["arm"] for row in rows if row["pass"] == passes[0]]
    arms = [arm for arm in arms if arm not in (PLAIN, OLD_PLAIN)]
    figure = report.new_figure(4 * len(passes) + 2, 1 + 0.28 * len(arms))
    for place, name in enumerate(passes):
        axes = figure.add_subplot(1, len(passes), place + 1)
        by_arm = {row["arm"]: row for row in rows if row["pass"] == name}
        added = [_percent(by_arm[arm]["ratio"]) for arm in arms]
        bars = axes.barh(range(len(arms)), added, color=[_colour(arm) for arm in arms])
        axes.bar_label(bars, [f"{each:+.1f}" for each in added], padding=2, fontsize=7)
        axes.set_yticks(range(len(arms)), arms if place == 0 else [""] * len(arms), fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("added to the plain model, %", fontsize=8)
    return figure


def _colour(arm: str) -> str:
    kinds = {"hook": "#999999", "replica": "#1b7837", "remote": "#2166ac", "faiss": "#b35806"}
    return next((colour for kind, colour in kinds.items() if arm.startswith(kind)), "#6baed6")


def _groups(
    bench: Bench, directory: Path, old: Path | None
) -> dict[str, Callable[[], AbstractContextManager[list[Arm]]]]:
    """Kinds of arms, and how they are made."""
    made: dict[str, Callable[[], AbstractContextManager[list[Arm]]]] = {
        "replica": lambda: nullcontext(replica_arms(bench)),
        "faiss": lambda: nullcontext(peer_arms(bench)),
        "remote": lambda: remote_arms(bench, directory),
    }
    if old is not None:
        made["old"] = lambda: old_arms(bench, old, directory)
    return made


def run(
    shape: Shape,
    plan: Plan,
    cache: Path,
    progress: Progress,
    *,
    old: Path | None = None,
    only: str = "",
    clock_ns: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, Any]:
    """Builds, measures; the document of a run. `only`: a pattern of arms beside the plain model."""
    load = report.load_average()
    progress.say(f"a model of {shape.layers} layers, its keys ...")
    model = make_model(shape)
    entries = make_entries(model, shape, cache)
    peers = KINDS[:2] if plan is QUICK else KINDS  # IVFPQ trains for minutes
    bench = Bench(model, shape, entries, Passes(model, shape, clock_ns), cache, progress, peers)
    with tempfile.TemporaryDirectory(prefix="end-to-end-") as made, ExitStack() as stack:
        arms = [bench.arm(PLAIN, None), bench.arm("hook", identity)]
        for name, make in _groups(bench, Path(made), old).items():
            if re.search(only, name):
                arms += stack.enter_context(make())
        rows = rows_of(arms, take_turns(arms, plan, shape.seed, progress), shape.layers)
    settings = asdict(shape) | {
        "decoded": DECODED,
        "only": only,
        "processor_time": clock_ns is not time.perf_counter_ns,
        "rounds": {what.name: rounds for what, rounds in plan},
    }
    return report.document("end_to_end", settings, rows, ratios_of(rows), load)


def main(
    json_file: report.JsonFile,
    layers: Annotated[int, typer.Option(min=1, help="MoE layers; 0.84 GB each.")] = 4,
    keys: Annotated[int, typer.Option(min=40, help="Keys per layer.")] = 20_000,
    quick: Annotated[
        bool, typer.Option("--quick", help="The short set: two layers, few rounds.")
    ] = False,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="A toy model, for trying the program.")
    ] = False,
    only: Annotated[
        str, typer.Option(help="A pattern of arms: replica, faiss, remote, old. Default: all.")
    ] = "",
    processor_time: Annotated[
        bool,
        typer.Option(
            "--processor-time",
            help="Of this process, for a machine that others use: arms in this process only, OMP_NUM_THREADS=1.",
        ),
    ] = False,
    old: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            resolve_path=True,
            help="A checkout of another version; its remote way takes turns.",
        ),
    ] = None,
    plot_file: report.PlotFile = None,
    cache: Annotated[Path, typer.Option(help="Keeps keys and indexes between runs.")] = CACHE,
    seed: report.Seed = 0,
    quiet: report.Quiet = False,
) -> None:
    """Measure what retrieval adds to decoding and to prefill, the arms in turn."""
    shape = Shape(2 if quick else layers, keys=keys, seed=seed)
    if tiny:
        shape = Shape.tiny(layers, keys, seed)
    plan = QUICK if quick else FULL
    if tiny:
        plan = [(Pass(what.kind, what.batch, 16), 1) for what, _ in plan]
    clock_ns = time.process_time_ns if processor_time else time.perf_counter_ns
    progress = Progress(quiet=quiet)
    made = run(shape, plan, cache, progress, old=old, only=only, clock_ns=clock_ns)
    report.publish(made, report.Files(json_file, plot_file, quiet), table, plot)


if __name__ == "__main__":
    typer.run(main)
