"""Writes and lookups at several services on one cluster, against a model of what was acknowledged.

Each writer has ids of its own, so what the last acknowledged write of an id left is what every service must find.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import grpc
import numpy as np
from knnmoe import tensors
from knnmoe.channels import open_channel
from knnmoe.v1 import doctor_pb2 as doctor_pb
from knnmoe.v1 import (
    doctor_pb2_grpc,
    memory_admin_pb2_grpc,
    retention_pb2_grpc,
    routing_pb2_grpc,
)
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from knnmoe.v1 import retention_pb2 as retention_pb
from knnmoe.v1 import routing_pb2 as routing_pb
from knnmoe.v1 import types_pb2 as types_pb

from tests.faults.crash_model import DIMENSION, EXPERTS, Expectation, Fact, key_of, value_of
from tests.integration.replaced_memories import names
from tests.integration.server_snapshots import until
from tests.qdrant_standin import QdrantCluster
from tests.sidecar import LOGIT_DELTA, Sidecar

NAME, LAYERS = "law", 2
MODEL = {"num_layers": LAYERS, "hidden_size": DIMENSION, "num_experts": EXPERTS}
CALL_S, WAIT_S, EQUAL_S = 30.0, 60.0, 30.0
# Until a node that is cut off is set aside, on a busy machine.
_LAG_S = 10.0
_IDS_PER_WRITER = 150
_KEPT = 9000
_SOURCE = "load"
# What a client may be answered while a cluster changes: to try again.
PASSES = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
)


class Call(NamedTuple):
    """One that has ended; times are of time.monotonic()."""

    phase: str
    kind: str
    status: str
    began_s: float
    ended_s: float


class Caller:
    """One service over a channel of its own."""

    def __init__(self, service: Sidecar, digest: str) -> None:
        self.channel, self._digest = open_channel(service.target), digest
        self._admin = memory_admin_pb2_grpc.MemoryAdminServiceStub(self.channel)
        self._retention = retention_pb2_grpc.RetentionServiceStub(self.channel)
        self._doctor = doctor_pb2_grpc.DoctorServiceStub(self.channel)
        self._routing = routing_pb2_grpc.RoutingServiceStub(self.channel)

    def upsert(self, layer: int, ids: Sequence[int], stamps: Sequence[int]) -> None:
        list(self.begin_upsert(layer, ids, stamps))

    def begin_upsert(self, layer: int, ids: Sequence[int], stamps: Sequence[int]) -> Any:
        """The call, whose answer is its acknowledgement."""
        entries = admin_pb.Entries(
            ids=tensors.to_tensor(np.array(ids, np.uint64)),
            keys=tensors.to_tensor(key_of(ids, stamps)),
            logit_deltas=tensors.to_tensor(value_of(ids, stamps)),
            provenance=[types_pb.Provenance(source=_SOURCE)] * len(ids),
        )
        request = admin_pb.UpsertRequest(
            memory=NAME, layer=layer, entries=entries, model_digest=self._digest
        )
        return self._admin.Upsert(iter([request]), timeout=CALL_S)

    def delete(self, layer: int, ids: Sequence[int]) -> None:
        numbers = tensors.to_tensor(np.array(ids, np.uint64))
        request = retention_pb.DeleteRequest(memory=NAME, layer=layer, ids=numbers)
        self._retention.Delete(request, timeout=CALL_S)

    def nearest(
        self, layer: int, keys: Any, *, timeout_s: float = CALL_S, timeout_us: int = 0
    ) -> list[int]:
        """The ids of the nearest neighbours of some keys; `timeout_us`: as the message says it, 0 for none."""
        request = routing_pb.RouteRequest(
            memory=NAME,
            layer=layer,
            model_digest=self._digest,
            router_inputs=tensors.to_tensor(keys),
            router_logits=tensors.to_tensor(np.zeros((len(keys), EXPERTS), np.float32)),
            with_neighbours=True,
            timeout_us=timeout_us,
        )
        reply = self._routing.Route(request, timeout=timeout_s)
        return [int(row[0]) for row in tensors.to_array(reply.neighbours.ids)]

    def stamps(self, layer: int) -> dict[int, int]:
        """What the service exports: stamps by id."""
        request = admin_pb.ExportRequest(memory=NAME, layer=layer, batch_size=4096)
        found: dict[int, int] = {}
        for reply in self._admin.Export(request, timeout=CALL_S):
            ids = tensors.to_array(reply.entries.ids).tolist()
            stamps = tensors.to_array(reply.entries.logit_deltas)[:, 0].astype(int).tolist()
            assert np.array_equal(tensors.to_array(reply.entries.keys), key_of(ids, stamps))
            found |= dict(zip(ids, stamps, strict=True))
        return found

    def warnings(self) -> list[str]:
        """Of the service about the memory: that writes are not finished, for one."""
        findings = self._doctor.Diagnose(doctor_pb.DiagnoseRequest(), timeout=CALL_S).findings
        return [
            each.what
            for each in findings
            if each.check == NAME and each.severity != doctor_pb.SEVERITY_OK
        ]


class Load:
    """Runs from __enter__ to __exit__: two writers and a reader for each service.

    Attributes:
        longest_s: that a call took.
        passes: what a call may be refused with.
        said: the last refusal of each kind of call.
        kept: entries of layer 0 that no writer touches, so that whoever looks them up knows the answer.

    """

    def __init__(self, services: Sequence[Sidecar], *, keep: int = 0) -> None:
        """`keep`: how many entries there are that no writer touches."""
        # Another gamma than the default: the doctor is to have nothing to say.
        self.digest = services[0].create(
            NAME, model=MODEL, kind=LOGIT_DELTA, neighbours=1, gamma=[2.0]
        )
        for service in services:
            until(lambda service=service: NAME in names(service))
        self._callers = [Caller(service, self.digest) for service in services]
        self.longest_s = 0.0
        self.passes = PASSES
        self.said = dict[str, str]()
        self.expected = Expectation([{} for _ in range(LAYERS)])
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.calls: list[Call] = []
        self._changed = threading.Condition()  # of the four above
        self._stamp = 0
        self.phase = "whole"  # what happens to the cluster, for who reads what went wrong
        self.cut_off = False  # whether a node is, or was a moment ago
        self._resting = self._ended = False
        self._busy = 0
        self.kept = range(_KEPT, _KEPT + keep)
        if keep:
            stamps, facts = self.begin(0, self.kept)
            self._callers[0].upsert(0, self.kept, stamps)
            self._acknowledge(0, facts)
            self.kept_keys = key_of(self.kept, stamps)
        count = len(self._callers)
        self._threads = [
            threading.Thread(target=self._write, args=(number, number % count), daemon=True)
            for number in range(2 * count)
        ]
        self._threads += [
            threading.Thread(target=self._look, args=(number,), daemon=True)
            for number in range(count)
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        for thread in self._threads:
            thread.join(2 * CALL_S)
        for caller in self._callers:
            caller.channel.close()

    def wait_for_more(self, **counts: int) -> None:
        """Until so many more of each kind are done, lookups at each service."""
        wanted = {kind: self.done[kind] + more for kind, more in self._kinds(counts).items()}
        with self._changed:
            came = self._changed.wait_for(
                lambda: self.wrong or all(self.done[kind] >= n for kind, n in wanted.items()),
                WAIT_S,
            )
        assert not self.wrong, self.wrong
        assert came, f"{dict(self.done)} after {WAIT_S} s, expected {wanted}; at last {self.said}"

    def _kinds(self, counts: dict[str, int]) -> Iterator[Any]:
        per_service = {
            f"lookups at {number}": counts.get("lookups", 0) for number in range(len(self._callers))
        }
        return {kind: n for kind, n in counts.items() if kind != "lookups"} | per_service

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Inside, nobody writes or looks."""
        with self._changed:
            self._resting = True
            assert self._changed.wait_for(lambda: not self._busy, 2 * CALL_S)
        try:
            yield
        finally:
            with self._changed:
                self._resting = False
                self._changed.notify_all()

    def wait_until_written(self) -> None:
        """Until the services have sent again all that failed."""
        end = time.monotonic() + EQUAL_S
        while unfinished := [line for caller in self._callers for line in caller.warnings()]:
            assert time.monotonic() < end, unfinished
            time.sleep(0.05)

    def check(self) -> None:
        """Every service holds what was acknowledged; of what was not, the same at all of them."""
        problems = self.problems()
        assert not problems, problems

    def problems(self) -> list[str]:
        """See check(); an entry each."""
        found = [[caller.stamps(layer) for layer in range(LAYERS)] for caller in self._callers]
        problems = [
            f"services {number} and 0 differ in layer {layer}: {each[layer].items() ^ found[0][layer].items()}"
            for number, each in enumerate(found)
            for layer in range(LAYERS)
            if each[layer] != found[0][layer]
        ]
        return problems + self.expected.settle(found[0])

    def begin(self, layer: int, ids: Sequence[int]) -> tuple[Sequence[int], dict[int, Fact | None]]:
        """Entries that are about to be written: their stamps, and what may be there from now on."""
        with self._changed:
            stamps = range(self._stamp + 1, self._stamp + 1 + len(ids))
            self._stamp += len(ids)
            facts: dict[int, Fact | None] = {
                i: Fact(stamp, _SOURCE) for i, stamp in zip(ids, stamps, strict=True)
            }
            self.expected.begin(layer, facts)
        return stamps, facts

    def _write(self, writer: int, service: int) -> None:
        rng = np.random.default_rng(writer)
        first = writer * _IDS_PER_WRITER
        while not self._ended:
            with self._turn():
                layer, count = int(rng.integers(LAYERS)), int(rng.integers(1, 5))
                ids = (first + rng.choice(_IDS_PER_WRITER, count, replace=False)).tolist()
                if rng.random() < 0.7:
                    self._upsert(service, layer, ids)
                else:
                    self._delete(service, layer, ids)

    def _upsert(self, service: int, layer: int, ids: list[int]) -> None:
        stamps, facts = self.begin(layer, ids)
        if self._done("upserts", lambda: self._callers[service].upsert(layer, ids, stamps)):
            self._acknowledge(layer, facts)
            for number in range(len(self._callers)):
                self._check_found(number, layer, ids, key_of(ids, stamps), own=number == service)

    def _delete(self, service: int, layer: int, ids: list[int]) -> None:
        gone: dict[int, Fact | None] = dict.fromkeys(ids)
        with self._changed:
            before = {i: self.expected.layers[layer].get(i) for i in ids}
            self.expected.begin(layer, gone)
        if self._done("deletes", lambda: self._callers[service].delete(layer, ids)):
            self._acknowledge(layer, gone)
            known = {i: fact.stamp for i, fact in before.items() if fact is not None}
            for number in range(len(self._callers)) if known else ():
                self._check_gone(number, layer, known, own=number == service)

    def _acknowledge(self, layer: int, facts: dict[int, Fact | None]) -> None:
        with self._changed:
            self.expected.acknowledge(layer, facts)
            self.done["acknowledged"] += 1
            self._changed.notify_all()

    def _check_found(
        self, number: int, layer: int, ids: list[int], keys: Any, *, own: bool
    ) -> None:
        wrong = self._asked(number, layer, keys, own, lambda found: found != ids)
        if wrong:
            self.blame(f"layer {layer}: {ids} were acknowledged, {wrong} found by {number}")

    def _check_gone(self, number: int, layer: int, known: dict[int, int], *, own: bool) -> None:
        keys = key_of(known, known.values())
        wrong = self._asked(number, layer, keys, own, lambda found: bool(set(found) & set(known)))
        if wrong:
            self.blame(f"layer {layer}: {list(known)} were deleted, {wrong} found by {number}")

    def _asked(
        self, number: int, layer: int, keys: Any, own: bool, is_wrong: Callable[[list[int]], bool]
    ) -> list[int]:
        """What a service finds, if that is wrong.

        What was written through one service another may miss for a while, should it ask a node that is cut off from the
        others and has not been set aside yet; see docs/qdrant-server.md.
        """
        found: list[int] = []

        def look() -> None:
            found[:] = self._callers[number].nearest(layer, keys)

        may_lag, end = self.cut_off and not own, time.monotonic() + _LAG_S
        while self._done("checks", look) and is_wrong(found):
            if not may_lag or time.monotonic() > end:
                return found
            time.sleep(0.05)
        return []

    def _look(self, service: int) -> None:
        rng = np.random.default_rng(100 + service)
        keys = rng.uniform(-1, 1, (2, DIMENSION)).astype(np.float32)
        while not self._ended:
            with self._turn():
                layer = int(rng.integers(LAYERS))
                self._done(f"lookups at {service}", lambda: self._look_once(service, layer, keys))  # noqa: B023

    def _look_once(self, service: int, layer: int, keys: Any) -> None:
        if not self.kept:
            self._callers[service].nearest(layer, keys)
        elif (found := self._callers[service].nearest(0, self.kept_keys)) != list(self.kept):
            self.blame(f"layer 0: {list(self.kept)} are there, {found} found by {service}")

    def _done(self, kind: str, work: Callable[[], Any]) -> bool:
        """Whether it succeeded; failures that do not pass are wrong."""
        asked, status, began_s = kind, grpc.StatusCode.OK, time.monotonic()
        try:
            work()
        except grpc.RpcError as error:
            status = error.code()
            if status not in self.passes:
                self.blame(f"{kind}: {status.name}: {error.details()}")
            kind = f"refused {kind}"
            self.said[kind] = f"{status.name}: {error.details()}"
        with self._changed:
            ended_s = time.monotonic()
            self.longest_s = max(self.longest_s, ended_s - began_s)
            self.calls.append(Call(self.phase, asked, status.name, began_s, ended_s))
            self.done[kind] += 1
            self.done["ended writes"] += kind.endswith(("upserts", "deletes"))
            self.done["ended deletes"] += kind.endswith("deletes")
            self._changed.notify_all()
        return not kind.startswith("refused")

    def blame(self, problem: str) -> None:
        """Something is wrong, in this phase."""
        with self._changed:
            self.wrong.append(f"{self.phase}: {problem}")
            self._changed.notify_all()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._resting or self._ended)
            self._busy += 1
        try:
            yield
        finally:
            with self._changed:
                self._busy -= 1
                self._changed.notify_all()
            time.sleep(0.005)  # the machine is shared by all of them


def options(
    cluster: QdrantCluster, first: int, writes: int, timeout_s: float = 10.0
) -> dict[str, object]:
    """Of a service that is given all nodes, one of them first; lookups get long, for the machine may be busy."""
    urls = cluster.urls[first:] + cluster.urls[:first]
    flags = ["--qdrant-replication-factor", "2", "--flush-interval-s", "0.1"]
    flags += ["--qdrant-timeout-s", str(timeout_s)]
    flags += ["--qdrant-write-consistency-factor", str(writes)]
    return {"backend": ",".join(urls), "flags": flags}


def wait_until_equal(cluster: QdrantCluster) -> None:
    """All replicas of all shards hold the same, a while after the cluster is whole again."""
    cluster.wait_whole()
    end = time.monotonic() + EQUAL_S
    while differing := [
        line for name in cluster.collections() for line in cluster.replicas_differ(name)
    ]:
        assert time.monotonic() < end, differing
        time.sleep(0.05)
