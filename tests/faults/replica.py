"""Random work on two memories of one sidecar, which replicas follow through it all: against NumPy, and against Route.

    python -m tests.faults.replica --steps 10000 --seed 0
    python -m tests.faults.replica --steps 1000 --first-pass pca

Entries come, are replaced and deleted; memories are pruned, indexed, read otherwise, brought back from snapshots and
replaced; the stream is cut, the sidecar is killed, also while it writes. After each step the replicas catch up to what
was acknowledged, hold exactly that, and answer like Route and like NumPy in float64. With a first pass, in larger
layers, what they find is there, and the nearest is found.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import grpc
import numpy as np
import torch
from knnmoe import tensors
from knnmoe.client import AdminClient, ExampleRef, ReplicationClient
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from knnmoe.v1 import retention_pb2 as retention_pb
from knnmoe.v1 import retention_pb2_grpc, snapshots_pb2_grpc
from knnmoe.v1 import routing_pb2 as routing_pb
from knnmoe.v1 import snapshots_pb2 as snapshots_pb
from knnmoe.v1 import types_pb2 as types_pb
from numpy.typing import NDArray

from model_runner.architectures import Assignment
from model_runner.progress import Progress
from model_runner.replica.budget import Budget
from model_runner.replica.copy import ReplicaCopy
from model_runner.replica.follower import Follower
from model_runner.replica.retriever import ReplicaRetriever
from model_runner.replica.search import nearest
from model_runner.router_client import OnError
from model_runner.routing_policy import Retrieved
from tests.integration.knn_moe_reference import blended_of, dense
from tests.qdrant_standin.tcp_faults import TcpFaults
from tests.sidecar import (
    ASSIGNMENT,
    CALL_TIMEOUT_S,
    COSINE,
    DENSE_VALUES,
    EXPERTS,
    HIDDEN,
    LOGIT_DELTA,
    LOGITS,
    RBF,
    TOP_K,
    Assignments,
    Sidecar,
    make_fingerprint,
    random_assignments,
    random_keys,
    route_request,
)

LAYERS, SOURCES, EXAMPLES = 2, 3, 12
MODEL = {"num_layers": LAYERS}
KINDS = {
    "deltas": (LOGIT_DELTA, RBF),
    "assignments": (ASSIGNMENT, COSINE),
    "logits": (LOGITS, RBF),
}
TOKENS = (1, 2, 7, 64, 512, 2048)
PATIENCE_S = 60.0
TOLERANCE, LEAST_RECALL = 1e-5, 0.99
# Where the K-th and the next neighbour, or a lambda and its bound, are so close, either answer is right.
CLOSE = 1e-4
F64 = NDArray[np.float64]


class Violation(AssertionError):
    """A replica is not what was acknowledged."""


class Entry(NamedTuple):
    """As it was sent, the key of length 1 under cosine; W = N logits or deltas, or k experts and then k weights."""

    key: NDArray[np.float32]
    value: NDArray[np.float32]
    example: ExampleRef


Layer = dict[int, Entry]


class Size(NamedTuple):
    """Of both memories. Later numbers of a key say less, as those of router inputs do."""

    ids: int = 300
    hidden: int = HIDDEN
    least: float = 1.0
    first_pass: str = "exact"
    rows: tuple[int, ...] = (1, 5, 40, 200)

    def keys(self, rng: np.random.Generator, rows: int) -> NDArray[np.float32]:
        """[rows, hidden]."""
        spread = np.geomspace(1.0, self.least, self.hidden)
        return (random_keys(rng, rows, self.hidden) * spread).astype(np.float32)


SMALL = Size()
# Where a first pass can be of use.
LARGE = Size(4000, 128, 0.01, "pca", (1, 40, 400, 2000))


@dataclass
class Truth:
    """What was acknowledged of one memory."""

    kind: int
    similarity: int
    settings: dict[str, Any]
    layers: list[Layer] = field(default_factory=lambda: [{} for _ in range(LAYERS)])

    def copy(self) -> Truth:
        """Of this moment."""
        return Truth(
            self.kind, self.similarity, dict(self.settings), [dict(layer) for layer in self.layers]
        )


class Replica:
    """Of one memory, from __enter__ to __exit__."""

    def __init__(self, target: str, name: str, size: Size = SMALL) -> None:
        fingerprint = make_fingerprint(**MODEL, hidden_size=size.hidden)
        client = ReplicationClient(target, name, fingerprint)
        self.copy = ReplicaCopy(torch.device("cpu"), "f32", Budget(2**28), size.first_pass)
        self.follower = Follower(client, self.copy)
        self.retriever = ReplicaRetriever(
            self.copy,
            EXPERTS,
            obstacle=self.follower.obstacle,
            on_error=OnError.RAISE,
            first_pass=size.first_pass,
        )

    def __enter__(self) -> Self:
        self.follower.start()
        self.follower.wait_until_complete(PATIENCE_S, Progress(quiet=True))
        return self

    def __exit__(self, *_: object) -> None:
        self.follower.close()


class World:
    """A sidecar, its two memories, and replicas behind a proxy. All that is random follows from the seeds of do()."""

    def __init__(self, data: Path, size: Size = SMALL) -> None:
        self.size = size
        self._stack = ExitStack()
        self.sidecar = Sidecar(data)
        port = int(self.sidecar.target.rsplit(":", 1)[1])
        self.proxy = self._stack.enter_context(TcpFaults(port))
        self._admin = AdminClient(self.sidecar.target)
        self.done: Counter[str] = Counter()
        self.truths: dict[str, Truth] = {}
        self.snapshots: dict[str, dict[str, Truth]] = {}
        self.replicas: dict[str, Replica] = {}
        self._asked = self._found = 0
        self._made = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()
        self._stack.close()
        self._admin.close()
        self.sidecar.__exit__()

    @property
    def recall(self) -> float:
        """Of the nearest neighbour, over all tokens that were looked up."""
        return self._found / max(1, self._asked)

    def first_passes(self) -> int:
        """Layers that have one now."""
        layers = [
            each for replica in self.replicas.values() for each in replica.copy.layers.values()
        ]
        passes = [each.first_pass for each in layers if each.first_pass is not None]
        return sum(any(plan.candidates for plan in each.plans.values()) for each in passes)

    def begin(self) -> None:
        """Two empty memories, and their replicas."""
        self.leave()
        self._made += 1
        for name, (kind, similarity) in KINDS.items():
            self.truths[f"{name}-{self._made}"] = self._create(
                f"{name}-{self._made}", kind, similarity
            )
        for name in self.truths:
            self.snapshots[name] = {}
            replica = Replica(f"127.0.0.1:{self.proxy.port}", name, self.size)
            self.replicas[name] = self._stack.enter_context(replica)

    def leave(self) -> None:
        """Ends the replicas; memories stay."""
        for replica in self.replicas.values():
            replica.follower.close()
        for mapping in (self.truths, self.snapshots, self.replicas):
            mapping.clear()

    def do(self, step: str, memory: int, seed: int) -> None:
        """One step on one of the two memories."""
        name = list(self.truths)[memory]
        getattr(self, step)(name, np.random.default_rng(seed))
        self.done[step] += 1

    # Steps.

    def upsert(self, name: str, rng: np.random.Generator) -> None:
        """New entries and replaced ones."""
        layer, rows = int(rng.integers(LAYERS)), self._random_rows(name, rng)
        self._send(name, layer, rows)
        self.truths[name].layers[layer].update(rows)

    def delete(self, name: str, rng: np.random.Generator) -> None:
        """Some that are there, some that may be."""
        layer, ids = (
            int(rng.integers(LAYERS)),
            rng.choice(self.size.ids, rng.integers(1, 20), False),
        )
        numbers = tensors.to_tensor(ids.astype(np.uint64))
        request = retention_pb.DeleteRequest(memory=name, layer=layer, ids=numbers)
        self._retention.Delete(request, timeout=CALL_TIMEOUT_S)
        for each in ids.tolist():
            self.truths[name].layers[layer].pop(each, None)

    def prune(self, name: str, rng: np.random.Generator) -> None:
        """Forgets an example in all layers, unless nothing would be left of one."""
        example = _example(rng)
        kept = [
            {n: entry for n, entry in layer.items() if entry.example != example}
            for layer in self.truths[name].layers
        ]
        if not all(kept):
            return
        forget = retention_pb.EntryFilter(source=example.source, example=example.example)
        request = retention_pb.PruneRequest(
            memory=name, plan=retention_pb.PrunePlan(forget=[forget])
        )
        list(self._retention.Prune(request, timeout=CALL_TIMEOUT_S))
        self.truths[name].layers = kept

    def optimize(self, name: str, rng: np.random.Generator) -> None:
        """Builds indexes."""
        request = admin_pb.OptimizeRequest(memory=name)
        list(self.sidecar.admin.Optimize(request, timeout=CALL_TIMEOUT_S))

    def settings(self, name: str, rng: np.random.Generator) -> None:
        """Read otherwise from here on."""
        truth = self.truths[name]
        chosen = _random_settings(truth.kind, rng)
        request = admin_pb.UpdateSettingsRequest(
            memory=name, settings=types_pb.MemorySettings(**chosen)
        )
        self.sidecar.admin.UpdateSettings(request, timeout=CALL_TIMEOUT_S)
        truth.settings |= chosen

    def snapshot(self, name: str, rng: np.random.Generator) -> None:
        """Of the last ones two are kept."""
        self._made += 1
        label = f"s{self._made}"
        request = snapshots_pb.CreateSnapshotRequest(memory=name, name=label)
        list(self._snapshots.CreateSnapshot(request, timeout=CALL_TIMEOUT_S))
        kept = self.snapshots[name]
        kept[label] = self.truths[name].copy()
        for old in list(kept)[:-2]:
            reference = snapshots_pb.DeleteSnapshotRequest(memory=name, name=old)
            self._snapshots.DeleteSnapshot(reference, timeout=CALL_TIMEOUT_S)
            del kept[old]

    def restore(self, name: str, rng: np.random.Generator) -> None:
        """In place."""
        if not self.snapshots[name]:
            self.snapshot(name, rng)
        label = str(rng.choice(list(self.snapshots[name])))
        request = snapshots_pb.RestoreSnapshotRequest(
            snapshot=snapshots_pb.SnapshotRef(memory=name, name=label), as_memory=name, replace=True
        )
        list(self._snapshots.RestoreSnapshot(request, timeout=CALL_TIMEOUT_S))
        self.truths[name] = self.snapshots[name][label].copy()

    def replace(self, name: str, rng: np.random.Generator) -> None:
        """Another memory takes its place."""
        old, by = self.truths[name], f"{name}-by"
        self.truths[by] = self._create(by, old.kind, old.similarity, rng)
        for layer in range(LAYERS):
            rows = self._random_rows(by, rng)
            self._send(by, layer, rows)
            self.truths[by].layers[layer].update(rows)
        request = admin_pb.ReplaceMemoryRequest(memory=name, by=by)
        self.sidecar.admin.ReplaceMemory(request, timeout=CALL_TIMEOUT_S)
        self.truths[name] = self.truths.pop(by)

    def cut(self, name: str, rng: np.random.Generator) -> None:
        """The streams are reset."""
        self.proxy.reset()

    def cut_off(self, name: str, rng: np.random.Generator) -> None:
        """Nobody reaches the sidecar while entries come and go."""
        self.proxy.refuse()
        self.proxy.reset()
        for _ in range(int(rng.integers(1, 4))):
            self.upsert(name, rng)
            self.delete(name, rng)
        self.proxy.heal()

    def kill(self, name: str, rng: np.random.Generator) -> None:
        """SIGKILL, and a start."""
        self.sidecar.kill()
        self._start_again()

    def kill_while_it_writes(self, name: str, rng: np.random.Generator) -> None:
        """Of what was not acknowledged each entry is the old one or the new one."""
        layer, rows = int(rng.integers(LAYERS)), self._random_rows(name, rng)
        acknowledgements = self._upsert(name, layer, rows)
        self.sidecar.kill()
        try:
            list(acknowledgements)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
        self._start_again()
        known = self.truths[name].layers[layer]
        found = self._exported(name, layer)
        for number, row in rows.items():
            if number in found and np.array_equal(found[number], row.value):
                known[number] = row

    # What holds after each.

    def check(self, seed: int) -> None:
        """All that was acknowledged is in the replicas, and they answer with it. Raises Violation."""
        rng = np.random.default_rng(seed)
        for name, replica in self.replicas.items():
            replica.follower.catch_up(lambda name=name: self._admin.describe(name), PATIENCE_S)  # type: ignore[misc]
            for layer in range(LAYERS):
                self._check_entries(name, layer, replica)
                self._check_answers(name, layer, replica, rng)

    def _check_entries(self, name: str, layer: int, replica: Replica) -> None:
        truth = self.truths[name]
        if not _speaks(truth, layer):
            return
        held, expected = replica.copy.layers[layer], truth.layers[layer]
        ids, _ = held.held()
        if ids.tolist() != sorted(expected):
            raise Violation(f"{name}, layer {layer}: ids {set(ids.tolist()) ^ set(expected)}")
        rows = torch.tensor([held._row_of[number] for number in ids.tolist()], dtype=torch.int64)
        for kind, found in (("key", held.stored_keys(rows)), ("value", held.values[rows])):
            wanted = [getattr(expected[number], kind) for number in ids.tolist()]
            if wanted and not np.allclose(found, np.stack(wanted), rtol=0, atol=1e-6):
                raise Violation(f"{name}, layer {layer}: a {kind} is another")

    def _check_answers(
        self, name: str, layer: int, replica: Replica, rng: np.random.Generator
    ) -> None:
        truth = self.truths[name]
        tokens = int(rng.choice(TOKENS, p=(0.2, 0.2, 0.3, 0.2, 0.08, 0.02)))
        inputs, own = self._random_tokens(truth, layer, tokens, rng)
        exclude = [_example(rng) for _ in range(int(rng.choice([0, 0, 1, 2, 64])))]
        if exclude and tokens % len(exclude):
            exclude = exclude[:1]
        expected = Expected.of(truth, layer, inputs, own, exclude)
        where = f"{name}, layer {layer}, {tokens} tokens, {len(exclude)} excluded, {truth.settings}"
        answered = _answer_of(replica, layer, inputs, own, exclude)
        if self.size.first_pass == "exact" or exclude:
            expected.compare(*answered, f"the replica: {where}")
        refs = [
            routing_pb.ExampleRef(source=ref.source, example=ref.example)
            for ref in exclude
            for _ in range(tokens // len(exclude))
        ]
        digest = self.sidecar.describe(name).model_digest
        reply = self.sidecar.route(
            route_request(name, digest, inputs, own, layer=layer, exclude=refs)
        )
        blended = _dense(own) if reply.WhichOneof("blended") is None else blended_of(reply)
        expected.compare(
            tensors.to_array(reply.lambdas).astype(np.float64), blended, f"Route: {where}"
        )
        if _speaks(truth, layer) and truth.layers[layer] and not exclude:
            self._count_recall(truth, layer, replica, inputs)

    def _count_recall(
        self, truth: Truth, layer: int, replica: Replica, inputs: NDArray[np.float32]
    ) -> None:
        queries = torch.from_numpy(_unit(inputs) if truth.similarity == COSINE else inputs)
        held = replica.copy.layers[layer]
        with replica.copy.lock:
            rows, distances = nearest(held, queries, 1)
        ids = np.array(sorted(truth.layers[layer]))
        keys = np.stack([truth.layers[layer][n].key for n in ids.tolist()])
        expected = _squared_distances(queries.numpy(), keys)
        found = np.searchsorted(ids, held.ids_of(rows[:, 0].numpy()).astype(np.int64))
        away = np.take_along_axis(expected, found[:, None], axis=1)
        if not np.allclose(distances, away, rtol=1e-4, atol=1e-4):
            raise Violation(f"layer {layer}: an entry is not where it was found")
        self._asked += len(found)
        self._found += int((found == expected.argmin(axis=1)).sum())

    # Requests.

    @property
    def _retention(self) -> retention_pb2_grpc.RetentionServiceStub:
        return retention_pb2_grpc.RetentionServiceStub(self.sidecar.channel)

    @property
    def _snapshots(self) -> snapshots_pb2_grpc.SnapshotServiceStub:
        return snapshots_pb2_grpc.SnapshotServiceStub(self.sidecar.channel)

    def _create(
        self, name: str, kind: int, similarity: int, rng: np.random.Generator | None = None
    ) -> Truth:
        chosen = _random_settings(kind, rng or np.random.default_rng(0))
        # The index finds all that a scan does.
        self.sidecar.create(
            name,
            model=MODEL | {"hidden_size": self.size.hidden},
            kind=kind,
            similarity=similarity,
            hnsw_ef=1000,
            **chosen,
        )
        return Truth(kind, similarity, chosen)

    def _start_again(self) -> None:
        data, target = self.sidecar.data, self.sidecar.target
        self.sidecar.__exit__()
        self.sidecar = Sidecar(data, listen=target)

    def _send(self, name: str, layer: int, rows: Mapping[int, Entry]) -> None:
        list(self._upsert(name, layer, rows))

    def _upsert(self, name: str, layer: int, rows: Mapping[int, Entry]) -> Any:
        values = np.stack([row.value for row in rows.values()])
        entries = admin_pb.Entries(
            ids=tensors.to_tensor(np.array(list(rows), np.uint64)),
            keys=tensors.to_tensor(np.stack([row.key for row in rows.values()])),
            provenance=[
                types_pb.Provenance(source=row.example.source, example=row.example.example)
                for row in rows.values()
            ],
        )
        kind = self.truths[name].kind
        if kind in DENSE_VALUES:
            getattr(entries, DENSE_VALUES[kind]).CopyFrom(tensors.to_tensor(values))
        else:
            both = Assignments(values[:, :TOP_K].astype(np.int32), values[:, TOP_K:])
            entries.assignments.CopyFrom(both.message())
        digest = self.sidecar.describe(name).model_digest
        request = admin_pb.UpsertRequest(
            memory=name, layer=layer, entries=entries, model_digest=digest
        )
        return self.sidecar.admin.Upsert(iter([request]), timeout=CALL_TIMEOUT_S)

    def _exported(self, name: str, layer: int) -> dict[int, NDArray[np.float32]]:
        """Values by id."""
        found: dict[int, NDArray[np.float32]] = {}
        request = admin_pb.ExportRequest(memory=name, layer=layer)
        for reply in self.sidecar.admin.Export(request, timeout=CALL_TIMEOUT_S):
            ids = tensors.to_array(reply.entries.ids).tolist()
            field = reply.entries.WhichOneof("values")
            if field in DENSE_VALUES.values():
                values = tensors.to_array(getattr(reply.entries, field))
            else:
                both = reply.entries.assignments
                values = np.hstack(
                    [tensors.to_array(both.experts), tensors.to_array(both.weights)]
                ).astype(np.float32)
            found |= dict(zip(ids, values, strict=True))
        return found

    def _random_rows(self, name: str, rng: np.random.Generator) -> Layer:
        truth, count = self.truths[name], int(rng.choice(self.size.rows))
        keys, origins = self.size.keys(rng, count), [_example(rng) for _ in range(count)]
        if truth.similarity == COSINE:
            keys = _unit(keys)
        if truth.kind in DENSE_VALUES:
            values = random_keys(rng, count, EXPERTS)
        else:
            both = random_assignments(rng, count)
            values = np.hstack([both.experts, both.weights]).astype(np.float32)
        ids = rng.choice(self.size.ids, count, replace=False).tolist()
        return {n: Entry(*row) for n, *row in zip(ids, keys, values, origins, strict=True)}

    def _random_tokens(
        self, truth: Truth, layer: int, tokens: int, rng: np.random.Generator
    ) -> tuple[NDArray[np.float32], Any]:
        """Some near keys, some far."""
        inputs = self.size.keys(rng, tokens)
        known = list(truth.layers[layer].values())
        for token in range(0, tokens if known else 0, 2):
            inputs[token] = known[int(rng.integers(len(known)))].key + 0.1 * inputs[token]
        if truth.kind in DENSE_VALUES:
            return inputs, random_keys(rng, tokens, EXPERTS)
        return inputs, random_assignments(rng, tokens)


@dataclass
class Expected:
    """Of T tokens, in float64: lambdas [T], blended [T, N], and which tokens have one right answer [T]."""

    lambdas: F64
    blended: F64
    clear: NDArray[np.bool_]

    @classmethod
    def of(
        cls,
        truth: Truth,
        layer: int,
        inputs: NDArray[np.float32],
        own: Any,
        exclude: list[ExampleRef],
    ) -> Expected:
        """From the formulas of the method."""
        tokens, plain = len(inputs), _dense(own)
        entries = list(truth.layers[layer].values())
        if not _speaks(truth, layer) or not entries:
            return cls(np.zeros(tokens), plain, np.ones(tokens, bool))
        how = truth.settings
        k, cosine = how["neighbours"], truth.similarity == COSINE
        distances = _squared_distances(
            _unit(inputs) if cosine else inputs, np.stack([each.key for each in entries])
        )
        for number, ref in enumerate(exclude):
            part = slice(number * tokens // len(exclude), (number + 1) * tokens // len(exclude))
            distances[part, [each.example == ref for each in entries]] = np.inf
        order = distances.argsort(axis=1)
        near = np.take_along_axis(distances, order, axis=1)
        near = np.pad(near, ((0, 0), (0, max(0, k + 1 - near.shape[1]))), constant_values=np.inf)
        with np.errstate(invalid="ignore"):  # two that are left out are no tie
            clear = ~(near[:, k] - near[:, k - 1] < CLOSE)
        kernel = np.clip(1 - near / 2, 0, 1) if cosine else np.exp(-how["gamma"][0] * near)
        s, rows = kernel[:, : min(k, len(entries))], order[:, :k]
        values = _dense_values(truth.kind, entries)[rows]
        total = s.sum(axis=1)
        if truth.kind == LOGIT_DELTA:
            beside = total + how["null_weight"]
            lambdas = total / beside
            deltas = np.einsum("tk,tkn->tn", s, values) / beside[:, None]
            blended = plain + how["step_size"][0] * deltas
        else:
            lambdas = total / k
            memory = np.einsum("tk,tkn->tn", s, values) / np.maximum(total, 1e-300)[:, None]
            blended = (1 - lambdas)[:, None] * plain + lambdas[:, None] * memory
            if truth.kind == ASSIGNMENT and how["support"] == types_pb.SUPPORT_TOP_K:
                blended, apart = _heaviest(blended)
                clear &= apart
        silent = ~(lambdas > how["min_lambda"])
        if how["min_lambda"]:
            clear &= np.abs(lambdas - how["min_lambda"]) > CLOSE
        lambdas = np.where(silent, 0.0, lambdas)
        return cls(lambdas, np.where(silent[:, None], plain, blended), clear)

    def compare(self, lambdas: F64, blended: F64, where: str) -> None:
        """Raises Violation."""
        for what, found, wanted in (
            ("lambda", lambdas, self.lambdas),
            ("blended", blended, self.blended),
        ):
            off = np.abs(found - wanted)[self.clear].max(initial=0.0)
            if not off <= TOLERANCE * max(1.0, np.abs(wanted).max(initial=0.0)):
                raise Violation(f"{where}: {what} is off by {off:.2e}")


def _answer_of(
    replica: Replica,
    layer: int,
    inputs: NDArray[np.float32],
    own: Any,
    exclude: list[ExampleRef],
) -> tuple[F64, F64]:
    if isinstance(own, Assignments):
        logits, chosen = random_keys(np.random.default_rng(0), len(inputs), EXPERTS), own
    else:
        logits, chosen = own, random_assignments(np.random.default_rng(0), len(inputs))
    assignment = Assignment(torch.from_numpy(chosen.weights), torch.from_numpy(chosen.experts))
    found = replica.retriever.lookup(
        layer, torch.from_numpy(inputs), torch.from_numpy(logits), assignment, exclude=exclude
    )
    if not isinstance(found, Retrieved):
        raise Violation(f"layer {layer}: {found}")
    lambdas = found.lambdas.double().numpy()
    if found.blended is None:
        return lambdas, _dense(own)
    if isinstance(found.blended, Assignment):
        return lambdas, dense(found.blended.experts.numpy(), found.blended.weights.numpy())
    return lambdas, found.blended.router_logits.double().numpy()


def _random_settings(kind: int, rng: np.random.Generator) -> dict[str, Any]:
    chosen: dict[str, Any] = {
        "neighbours": int(rng.choice([1, 3, 32])),
        "gamma": [float(rng.choice([0.02, 0.1, 1.0]))],
        "min_lambda": float(rng.choice([0.0, 0.0, 0.2])),
        "layers": [[0], [1], [0, 1], [0, 1]][int(rng.integers(4))],
    }
    if kind == LOGIT_DELTA:
        chosen |= {
            "step_size": [float(rng.choice([0.5, 2.0]))],
            "null_weight": float(rng.choice([0.1, 1.0])),
        }
    elif kind == ASSIGNMENT:
        chosen["support"] = int(rng.choice([types_pb.SUPPORT_UNION, types_pb.SUPPORT_TOP_K]))
    return chosen


def _example(rng: np.random.Generator) -> ExampleRef:
    return ExampleRef(f"source-{rng.integers(SOURCES)}", str(rng.integers(EXAMPLES)))


def _speaks(truth: Truth, layer: int) -> bool:
    return layer in truth.settings["layers"]


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    return (rows / lengths).astype(np.float32)


def _squared_distances(queries: NDArray[np.float32], keys: NDArray[np.float32]) -> F64:
    """[T, n], exact enough in float64 by the scalar product."""
    x, y = queries.astype(np.float64), keys.astype(np.float64)
    return np.maximum((x**2).sum(1)[:, None] - 2 * x @ y.T + (y**2).sum(1), 0.0)


def _dense(own: Any) -> F64:
    if isinstance(own, Assignments):
        return dense(own.experts, own.weights)
    return np.asarray(own, np.float64)


def _dense_values(kind: int, entries: list[Entry]) -> F64:
    values = np.stack([each.value for each in entries]).astype(np.float64)
    if kind in DENSE_VALUES:
        return values
    return dense(values[:, :TOP_K].astype(np.int64), values[:, TOP_K:])


def _heaviest(blended: F64) -> tuple[F64, NDArray[np.bool_]]:
    """The k heaviest, scaled to the total; and where they are clearly those."""
    order = blended.argsort(axis=1)[:, ::-1]
    ranked = np.take_along_axis(blended, order, axis=1)
    kept = np.zeros(blended.shape, bool)
    np.put_along_axis(kept, order[:, :TOP_K], values=True, axis=1)
    chosen = np.where(kept, blended, 0.0)
    scale = blended.sum(axis=1) / chosen.sum(axis=1)
    return chosen * scale[:, None], ranked[:, TOP_K - 1] - ranked[:, TOP_K] > CLOSE


# How often each step is taken, of a thousand.
STEPS = {
    "upsert": 530,
    "delete": 380,
    "settings": 40,
    "cut": 20,
    "prune": 10,
    "cut_off": 5,
    "snapshot": 4,
    "restore": 4,
    "replace": 3,
    "optimize": 2,
    "kill": 1,
    "kill_while_it_writes": 1,
}


def run(
    steps: int, seed: int, check_every: int, size: Size, say: Callable[[str], None]
) -> dict[str, Any]:
    """So many random steps. Raises Violation, which names the step and its seed."""
    rng = np.random.default_rng(seed)
    weights = np.array(list(STEPS.values()))
    with tempfile.TemporaryDirectory() as made, World(Path(made) / "data", size) as world:
        world.begin()
        for number in range(steps):
            step = str(rng.choice(list(STEPS), p=weights / weights.sum()))
            memory, own_seed = int(rng.integers(2)), int(rng.integers(2**31))
            try:
                world.do(step, memory, own_seed)
                if number % check_every == 0 or step not in ("upsert", "delete"):
                    world.check(own_seed)
            except Exception as error:
                raise Violation(f"step {number}, {step}({memory}, {own_seed}): {error}") from error
            if number % 500 == 499:
                say(f"step {number + 1}/{steps}: {dict(world.done)}")
        world.check(seed)
        if world.recall < LEAST_RECALL:
            raise Violation(f"recall@1 {world.recall:.4f}, expected at least {LEAST_RECALL}")
        return {
            "steps": dict(world.done),
            "recall_at_1": world.recall,
            "tokens": world._asked,
            "layers_with_a_first_pass": world.first_passes(),
        }


def main() -> int:
    """Prints the result as JSON; status 1 when a replica was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--check-every", type=int, default=1, help="upserts and deletions between two comparisons"
    )
    parser.add_argument("--first-pass", choices=("exact", "pca"), default="exact")
    arguments = parser.parse_args()
    size = SMALL if arguments.first_pass == "exact" else LARGE
    torch.set_num_threads(1)
    try:
        result = run(arguments.steps, arguments.seed, arguments.check_every, size, _say)
    except Violation as violation:
        _say(f"broken: {violation} (seed {arguments.seed})")
        return 1
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    return 0


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
