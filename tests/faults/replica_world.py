"""A sidecar with two memories, the replicas that follow them, and what can happen to all of these."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
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
from model_runner.replica.first_pass import CodedFirstPass
from model_runner.replica.follower import Follower
from model_runner.replica.retriever import ReplicaRetriever
from model_runner.replica.search import nearest
from model_runner.router_client import OnError
from model_runner.routing_policy import Retrieved
from tests.faults.replica_oracle import (
    F64,
    LAYERS,
    Entry,
    Expected,
    Layer,
    Truth,
    Violation,
    dense_of,
    speaks,
    squared_distances,
    unit,
)
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

SOURCES, EXAMPLES = 3, 12
MODEL = {"num_layers": LAYERS}
KINDS = {
    "deltas": (LOGIT_DELTA, RBF),
    "assignments": (ASSIGNMENT, COSINE),
    "logits": (LOGITS, RBF),
}
TOKENS = (1, 2, 7, 64, 512, 2048)
PATIENCE_S = 60.0


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
# Where keys are scanned as bytes, by what was compiled.
SCANNED = Size(4000, 128, 0.01, "auto", (1, 40, 400, 2000))


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
        self.looked_up = 0  # tokens, each by a replica and by Route
        self.scanned = 0  # lookups that a scan of bytes may answer
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

    def restart(self, name: str, rng: np.random.Generator) -> None:
        """SIGTERM, and a start."""
        if code := self.sidecar.stop():
            raise Violation(f"the sidecar ended with {code}: {self.sidecar.stderr}")
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
        if not speaks(truth, layer):
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
        self.looked_up += 2 * tokens
        if exclude or self._is_exact(replica, layer, tokens, truth.settings["neighbours"]):
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
        blended = dense_of(own) if reply.WhichOneof("blended") is None else blended_of(reply)
        expected.compare(
            tensors.to_array(reply.lambdas).astype(np.float64), blended, f"Route: {where}"
        )
        if speaks(truth, layer) and truth.layers[layer] and not exclude:
            self._count_recall(truth, layer, replica, inputs)

    def _is_exact(self, replica: Replica, layer: int, tokens: int, k: int) -> bool:
        held = replica.copy.layers.get(layer)
        first_pass = None if held is None else held.first_pass
        if not isinstance(first_pass, CodedFirstPass):
            return True
        scanned = first_pass.choice == "auto" and first_pass.bounded.serves(tokens, k)
        self.scanned += scanned
        return scanned

    def _count_recall(
        self, truth: Truth, layer: int, replica: Replica, inputs: NDArray[np.float32]
    ) -> None:
        queries = torch.from_numpy(unit(inputs) if truth.similarity == COSINE else inputs)
        held = replica.copy.layers[layer]
        with replica.copy.lock:
            rows, distances = nearest(held, queries, 1)
        ids = np.array(sorted(truth.layers[layer]))
        keys = np.stack([truth.layers[layer][n].key for n in ids.tolist()])
        expected = squared_distances(queries.numpy(), keys)
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
            keys = unit(keys)
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
        return lambdas, dense_of(own)
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
