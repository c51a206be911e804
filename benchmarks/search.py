"""Searches alone, next to FAISS: `python -m benchmarks.search --json FILE`.

A layer of a replica and FAISS's indexes of the same keys take turns, with caches evicted between calls: from router
inputs as tensors to rows and squared distances as tensors. The tokens that plans are measured on are not timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from rich import box
from rich.table import Table
from torch import Tensor

from benchmarks import report
from benchmarks.clustered import make_workload
from benchmarks.lanes import FAISS_FLAT, FAISS_HNSW, HNSW_EF, HNSW_LINKS, import_faiss
from benchmarks.olmoe import Shape, make_entries, make_model, router_inputs, zipf_tokens
from benchmarks.peers import FAISS_IVFPQ
from benchmarks.replicas import Layers
from benchmarks.timing import CacheSweep, Lane, batches, measure
from model_runner.progress import Progress
from model_runner.replica import search
from model_runner.replica.first_pass import CodedFirstPass
from model_runner.replica.layer import LayerReplica

Row = dict[str, Any]
Found = tuple[Tensor, Tensor]
Inputs = Literal["clustered", "olmoe"]

TOKENS, NEIGHBOURS = (1, 8, 64, 512), (1, 32)
QUERIES, MEASURED_ON = 1024, 256
AUTO, EXACT, PCA = "replica, auto", "replica, exact", "replica, pca"
FAISS_COMPOSITE = "faiss PCA64,HNSW16 refined"
# Candidates of the composite index per neighbour: 16 for one, 4 for 32 (more cost more than they find).
REFINED = {1: 16, 32: 4}
PROBES, LISTS_PER_ROOT, BYTES = 16, 1, 64


@dataclass(frozen=True, slots=True)
class Arm:
    """A way to search: queries f32 [T, d] and K to rows and squared distances."""

    name: str
    find: Callable[[Tensor, int], Found]
    nbytes: int  # beside the keys
    build_s: float


@dataclass(frozen=True, slots=True)
class Keys:
    """Keys [n, d] and queries [QUERIES + MEASURED_ON, d], f32."""

    stored: Tensor
    queries: Tensor

    @classmethod
    def made(cls, inputs: Inputs, number: int, dimension: int, seed: int) -> Keys:
        """Made up (see benchmarks.clustered), or of the second layer of an OLMoE with random weights."""
        if inputs == "clustered":
            workload = make_workload(number, dimension, QUERIES, MEASURED_ON, 1, seed)
            asked = np.concatenate([workload.queries.astype(np.float32), workload.held_out])
            return cls(torch.from_numpy(workload.keys), torch.from_numpy(asked))
        shape = Shape(2, keys=number, seed=seed)
        model = make_model(shape)
        tokens = zipf_tokens(shape, 5, (QUERIES + MEASURED_ON) // 5, seed + 1000)
        stored = make_entries(model, shape, None).keys[1].float()
        return cls(stored, router_inputs(model, tokens)[1].float())


def timed(build: Callable[[], Any]) -> tuple[Any, float]:
    """What was built, and how long that took."""
    started = time.perf_counter()
    return build(), time.perf_counter() - started


def replica_arms(keys: Keys) -> list[Arm]:
    """Every way of a replica: the scan, the first pass forced, and what `auto` makes of it."""
    values = torch.zeros(len(keys.stored), 1)
    layer = Layers.of([keys.stored], [values], 1).layers[0]
    passes = {AUTO: CodedFirstPass(layer), PCA: CodedFirstPass(layer, "pca")}

    def train(first_pass: CodedFirstPass) -> None:
        for k in NEIGHBOURS:
            first_pass.train(k, keys.queries[QUERIES:])

    built = {name: timed(partial(train, each))[1] for name, each in passes.items()}
    arms = [Arm(EXACT, lambda q, k: search.exact(layer, q, k), 0, 0.0)]
    for name, each in passes.items():
        found = _by(layer, each)
        arms.append(Arm(name, found, each.nbytes, built[name]))
    return arms


def _by(layer: LayerReplica, first_pass: CodedFirstPass) -> Callable[[Tensor, int], Found]:
    def find(queries: Tensor, k: int) -> Found:
        layer.first_pass = first_pass
        with layer.lock:
            return search.nearest(layer, queries, k)

    return find


def faiss_arms(faiss: Any, keys: Keys, progress: Progress) -> list[Arm]:
    """FAISS's indexes; the graph and the composite one refine from the same copy of the keys."""
    stored = keys.stored.numpy()
    count, dimension = stored.shape

    def graph() -> Any:
        index = faiss.IndexHNSWFlat(dimension, HNSW_LINKS)
        index.add(stored)
        index.hnsw.efSearch = HNSW_EF
        return index

    def inverted() -> Any:
        lists = max(1, min(round(LISTS_PER_ROOT * count**0.5), count // 40))
        codes = min(BYTES, dimension)
        index = faiss.IndexIVFPQ(faiss.IndexFlatL2(dimension), dimension, lists, codes, 8)
        index.train(stored[:10_000])
        index.add(stored)
        index.nprobe = PROBES
        return index

    def reduced() -> Any:
        index = faiss.index_factory(dimension, "PCA64,HNSW16")
        index.train(stored[:10_000])
        index.add(stored)
        faiss.ParameterSpace().set_index_parameter(index, "efSearch", HNSW_EF)
        return index

    arms = []
    for name, build in ((FAISS_HNSW, graph), (FAISS_IVFPQ, inverted), (FAISS_COMPOSITE, reduced)):
        progress.say(f"{name} ...")
        index, seconds = timed(build)
        if name == FAISS_HNSW:
            flat = index.storage  # the keys: shared by three arms
            arms.append(Arm(FAISS_FLAT, _in_faiss(flat), 0, 0.0))
        if name == FAISS_COMPOSITE:
            refined = faiss.IndexRefine(index, flat)
            arms.append(Arm(name, _refined(refined), _size(faiss, index), seconds))
            continue
        shared = keys.stored.nbytes if name == FAISS_HNSW else 0
        arms.append(Arm(name, _in_faiss(index), _size(faiss, index) - shared, seconds))
    return arms


def _size(faiss: Any, index: Any) -> int:
    return len(faiss.serialize_index(index))


def _in_faiss(index: Any) -> Callable[[Tensor, int], Found]:
    def find(queries: Tensor, k: int) -> Found:
        distances, rows = index.search(queries.numpy(), k)
        return torch.from_numpy(rows), torch.from_numpy(distances)

    return find


def _refined(index: Any) -> Callable[[Tensor, int], Found]:
    def find(queries: Tensor, k: int) -> Found:
        index.k_factor = REFINED[k]
        return _in_faiss(index)(queries, k)

    return find


def accuracy(arm: Arm, keys: Keys, k: int, nearest: Tensor) -> Row:
    """Recall@1 and @K by distance, and the error of lambda = mean s at the gamma that gives the median token 0.5."""
    queries = keys.queries[:QUERIES]
    rows, claimed = arm.find(queries, k)
    true = (keys.stored[rows.clamp_min(0)] - queries.unsqueeze(1)).square().sum(-1)
    gamma = np.log(2) / max(float(nearest[:, 0].median()), 1e-9)
    lambdas = [torch.exp(-gamma * each[:, :k]).mean(1) for each in (claimed, nearest)]
    error = (lambdas[0] - lambdas[1]).abs()
    return {
        "recall_at_1": float((true <= nearest[:, :1] * 1.00001).any(1).float().mean()),
        "recall_at_k": float((true <= nearest[:, k - 1 : k] * 1.00001).float().mean()),
        "lambda_error_max": float(error.max()),
        "lambda_error_mean": float(error.mean()),
    }


def rows_of_size(keys: Keys, rounds: int, seed: int, progress: Progress) -> list[Row]:
    """Every arm, K and number of tokens for one set of keys."""
    arms = [*replica_arms(keys), *faiss_arms(import_faiss(), keys, progress)]
    exact = next(arm for arm in arms if arm.name == EXACT)
    _, nearest = exact.find(keys.queries[:QUERIES], max(NEIGHBOURS))
    cache, rows = CacheSweep(64), []
    for k in NEIGHBOURS:
        known = {arm.name: accuracy(arm, keys, k, nearest) for arm in arms}
        for tokens in TOKENS:
            progress.say(f"{len(keys.stored)} keys, K = {k}, {tokens} tokens ...")
            lanes = [_lane(arm, keys.queries, k) for arm in arms]
            repeats = max(3, rounds // (1 + tokens // 8))
            samples = measure(lanes, batches(QUERIES, tokens, repeats), cache.sweep, seed)
            for arm, lane, found in zip(arms, lanes, samples, strict=True):
                row = report.row(lane, tokens, found) | known[arm.name]
                row |= {"keys": len(keys.stored), "dimension": keys.stored.shape[1]}
                rows.append(row | {"bytes": arm.nbytes, "build_s": round(arm.build_s, 2)})
    cache.close()
    return rows


def _lane(arm: Arm, queries: Tensor, k: int) -> Lane:
    def call(tokens: slice) -> None:
        arm.find(queries[tokens], k)

    return Lane(arm.name, "in-process", "f32", k, call)


def ratios_of(rows: Sequence[Row]) -> dict[str, float]:
    """What `auto` takes over what each FAISS index takes for the same lookup; medians."""
    p50 = {_cell(row): row["p50_ms"] for row in rows}
    return {
        f"{engine}: {keys} keys, K = {k}, {tokens} tokens": p50[AUTO, keys, k, tokens] / there
        for (engine, keys, k, tokens), there in p50.items()
        if engine.startswith("faiss")
    }


def _cell(row: Row) -> tuple[str, int, int, int]:
    return row["engine"], row["keys"], row["neighbours"], row["tokens"]


def table(rows: Sequence[Row]) -> Table:
    """A row per size, K, number of tokens and way."""
    made = Table(title="Search, ms (in turn, caches evicted between calls)", box=box.SIMPLE)
    columns = ("keys", "neighbours", "tokens", "engine", "p50_ms", "min_ms", "n")
    for column in (*columns, "recall@1", "recall@K", "lambda off by", "MiB", "build s"):
        made.add_column(column, justify="right")
    for row in rows:
        found = f"{row['recall_at_1']:.3f}", f"{row['recall_at_k']:.3f}"
        rest = f"{row['lambda_error_max']:.1e}", f"{row['bytes'] / 2**20:.0f}"
        made.add_row(*(str(row[c]) for c in columns), *found, *rest, str(row["build_s"]))
    return made


def main(
    json_file: report.JsonFile,
    keys: Annotated[list[int] | None, typer.Option(help="Numbers of keys.")] = None,
    dimension: Annotated[int, typer.Option(min=2, help="d of made-up keys.")] = 2048,
    inputs: Annotated[Inputs, typer.Option(help="Where keys and queries come from.")] = "clustered",
    rounds: Annotated[int, typer.Option(min=3, help="Turns with one token.")] = 60,
    quick: Annotated[bool, typer.Option("--quick", help="2,000 and 20,000 keys, d = 512.")] = False,
    seed: report.Seed = 0,
    quiet: report.Quiet = False,
) -> None:
    """Measure searches in a replica next to FAISS on the same keys."""
    numbers = keys or ([2_000, 20_000] if quick else [2_000, 20_000, 200_000])
    dimension, rounds = (512, 20) if quick else (dimension, rounds)
    progress, load = Progress(quiet=quiet), report.load_average()
    rows: list[Row] = []
    for number in numbers:
        made = Keys.made(inputs, number, dimension, seed)
        rows += rows_of_size(made, rounds, seed, progress)
    settings = {"keys": numbers, "dimension": dimension, "inputs": inputs, "rounds": rounds}
    settings |= {"seed": seed, "threads": torch.get_num_threads()}
    document = report.document("search", settings, rows, ratios_of(rows), load)
    report.publish(document, report.Files(json_file, None, quiet), table, None)


if __name__ == "__main__":
    typer.run(main)
