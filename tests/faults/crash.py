"""A crash loop: SIGKILL at random moments of random work, against a model of what was acknowledged.

    python -m tests.faults.crash --kills 200 --seed 0

Each round starts the service, compares every entry with the model, and begins new work: a writer that upserts and
deletes, and beside it at most one job (optimize, quantize, prune, snapshot, restore). At a random moment, in a third of
the index builds right after the new files have taken over, the service is killed.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from knnmoe import tensors
from knnmoe.channels import open_channel
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from knnmoe.v1 import retention_pb2 as retention_pb
from knnmoe.v1 import retention_pb2_grpc, snapshots_pb2_grpc
from knnmoe.v1 import routing_pb2 as routing_pb
from knnmoe.v1 import snapshots_pb2 as snapshots_pb
from knnmoe.v1 import types_pb2 as types_pb
from knnmoe.v1.memory_admin_pb2_grpc import MemoryAdminServiceStub

from tests.faults.crash_model import DIMENSION, EXPERTS, Expectation, Fact, Layer, key_of, value_of
from tests.faults.results import say
from tests.sidecar import LOGIT_DELTA, Sidecar

NAME, LAYERS = "crash", 2
MODEL = {"num_layers": LAYERS, "hidden_size": DIMENSION, "num_experts": EXPERTS}
TIMEOUT_S = 120.0
FILL = 512  # entries in a write at first
QUANTIZATIONS = ("none", "int8")
JOBS = ("optimize", "quantize", "prune", "snapshot", "restore", "none")
LONGEST_S = {
    "optimize": 3.0,
    "quantize": 3.0,
    "prune": 1.5,
    "snapshot": 1.0,
    "restore": 2.0,
    "none": 1.0,
}


class Violation(AssertionError):
    """The service broke a promise."""


class Lost(Violation):
    """Entries are not what was acknowledged: `problems`, one each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems[:5]) + f" ({len(problems)} in all)")
        self.problems = problems


class Wrong(Violation):
    """An answer that is not right."""


class CrashLoop:
    """One run. Every random choice follows from the seed; the moments at which work happens do not."""

    def __init__(self, data: Path, entries: int, seed: int) -> None:
        self.data, self.entries = data, entries
        self.rng = np.random.default_rng(seed)
        self.expected = Expectation([{} for _ in range(LAYERS)])
        self.stamp = 0
        self.lock = threading.Lock()  # of `expected`
        self.snapshots: dict[str, list[Layer]] = {}  # acknowledged, made while nothing was written
        self.restarts_s: list[float] = []
        self.kills: Counter[str] = Counter()
        self.acknowledged: Counter[str] = Counter()

    def start(self) -> Sidecar:
        """The service again; half of the time with every layer's engine in a process of its own."""
        flags = ["--isolate-above-mib", str(self.rng.choice([0, 64])), "--min-free-mib", "64"]
        started = time.monotonic()
        sidecar = Sidecar(self.data, flags=[*flags, "--optimize-above-mib", "1"])
        self.restarts_s.append(time.monotonic() - started)
        return sidecar

    def fill(self) -> None:
        """The first entries, acknowledged."""
        with self.start() as sidecar:
            self.digest = sidecar.create(
                NAME, model=MODEL, kind=LOGIT_DELTA, neighbours=1, gamma=[1.0]
            )
            work = Work(self, sidecar, np.random.default_rng(0))
            for layer in range(LAYERS):
                for first in range(0, self.entries, FILL):
                    ids = range(first, min(first + FILL, self.entries))
                    work.upsert(layer, [int(i) for i in ids])
            sidecar.stop_cleanly()

    def round(self, number: int) -> str:
        """Starts, checks, works, kills: a random job, at a random moment."""
        job = str(self.rng.choice(JOBS))
        writes = job != "restore" and self.rng.random() < 0.8
        swap = job in ("optimize", "quantize") and self.rng.random() < 0.33
        within_s = self.rng.uniform(0.0, LONGEST_S[job])
        self.kill_amid(job, within_s, writes=writes, swap=swap, deep=number % 10 == 9)
        return job

    def kill_amid(
        self, job: str, within_s: float, *, writes: bool, swap: bool = False, deep: bool = False
    ) -> None:
        """Starts, checks, and kills after so many seconds of work, or right after a swap."""
        with self.start() as sidecar:
            self.check(sidecar, deep=deep)
            work = Work(self, sidecar, np.random.default_rng(int(self.rng.integers(2**31))))
            threads = [threading.Thread(target=work.run_job, args=(job,), daemon=True)]
            if writes:
                threads.append(threading.Thread(target=work.write, daemon=True))
            elif job == "snapshot":
                work.remember = True
            before = self.currents()
            for thread in threads:
                thread.start()
            self.wait(within_s, before if swap else None)
            sidecar.process.kill()
            sidecar.process.wait()
            for thread in threads:
                thread.join()
        if work.failure is not None:
            raise Violation(f"{job}: {work.failure}")
        self.kills[job] += 1

    def wait(self, within_s: float, before: list[bytes] | None) -> None:
        """Until it is time to kill; given which generations counted `before`, until others do."""
        end = time.monotonic() + (within_s if before is None else 10)
        while time.monotonic() < end:
            if before is not None and self.currents() != before:
                self.kills["right after a swap"] += 1
                time.sleep(self.rng.uniform(0.0, 0.03))
                return
            time.sleep(0.002)

    def currents(self) -> list[bytes]:
        """Which generations count."""
        home = self.data / "memories" / NAME
        files = sorted([*home.glob("layer-*/CURRENT"), *home.glob("restored-*/layer-*/CURRENT")])
        return [file.read_bytes() for file in files if file.exists()]

    def check(self, sidecar: Sidecar, *, deep: bool) -> None:
        """Every entry, some lookups, and now and then every snapshot."""
        found: list[dict[int, int]] = []
        for layer in range(LAYERS):
            ids, stamps, keys = _exported(sidecar, layer)
            if not np.array_equal(keys, key_of(ids, stamps)):
                raise Wrong(f"layer {layer}: keys are not those of their ids")
            found.append(dict(zip(ids, stamps, strict=True)))
        deleted = [
            set(layer) - set(here) for layer, here in zip(self.expected.layers, found, strict=True)
        ]
        if problems := self.expected.settle(found):
            raise Lost(problems)
        for layer in range(LAYERS):
            self.check_lookups(sidecar, layer, sorted(deleted[layer])[:3])
        if deep:
            self.check_snapshots(sidecar)

    def check_lookups(self, sidecar: Sidecar, layer: int, deleted: list[int]) -> None:
        """An entry that is there is found at distance 0; one that is gone is not found."""
        facts = self.expected.layers[layer]
        chosen = [
            int(i) for i in self.rng.choice(sorted(facts), size=min(8, len(facts)), replace=False)
        ]
        keys = key_of(chosen, [facts[i].stamp for i in chosen])
        request = routing_pb.RouteRequest(
            memory=NAME,
            layer=layer,
            model_digest=self.digest,
            router_inputs=tensors.to_tensor(keys),
            router_logits=tensors.to_tensor(np.zeros((len(keys), EXPERTS), np.float32)),
            with_neighbours=True,
        )
        reply = sidecar.route(request)
        ids = tensors.to_array(reply.neighbours.ids)[:, 0].tolist()
        if ids != chosen:
            raise Wrong(f"layer {layer}: looked {chosen} up, found {ids}")
        if set(ids) & set(deleted):
            raise Wrong(f"layer {layer}: deleted entries were found")

    def check_snapshots(self, sidecar: Sidecar) -> None:
        """Those that were acknowledged are there, and those that are there are whole."""
        stub = snapshots_pb2_grpc.SnapshotServiceStub(sidecar.channel)
        listed = stub.ListSnapshots(
            snapshots_pb.ListSnapshotsRequest(memory=NAME), timeout=TIMEOUT_S
        )
        names = [each.name for each in listed.snapshots]
        if missing := self.snapshots.keys() - set(names):
            raise Violation(f"snapshots {missing} are gone")
        for name in names:
            reference = snapshots_pb.SnapshotRef(memory=NAME, name=name)
            request = snapshots_pb.VerifySnapshotRequest(snapshot=reference)
            list(stub.VerifySnapshot(request, timeout=TIMEOUT_S))
        for name in names[:-3]:
            stub.DeleteSnapshot(
                snapshots_pb.DeleteSnapshotRequest(memory=NAME, name=name), timeout=TIMEOUT_S
            )
            self.snapshots.pop(name, None)


class Work:
    """What is under way when the service is killed."""

    def __init__(self, loop: CrashLoop, sidecar: Sidecar, rng: np.random.Generator) -> None:
        self.loop, self.rng = loop, rng
        self.remember = False
        self.failure: str | None = None
        self.channel = open_channel(sidecar.target)
        self.admin = MemoryAdminServiceStub(self.channel)
        self.retention = retention_pb2_grpc.RetentionServiceStub(self.channel)
        self.snapshots = snapshots_pb2_grpc.SnapshotServiceStub(self.channel)

    def write(self) -> None:
        """Upserts and deletes until the service is gone."""
        while self.attempt("write", self.write_once):
            pass

    def write_once(self) -> None:
        layer, count = int(self.rng.integers(LAYERS)), int(self.rng.integers(1, 200))
        ids = self.rng.choice(int(1.2 * self.loop.entries), size=count, replace=False).tolist()
        if self.rng.random() < 0.6:
            self.upsert(layer, ids)
        else:
            self.delete(layer, ids)

    def attempt(self, name: str, job: Callable[[], None]) -> bool:
        """Whether it succeeded; it fails when the service is killed, and must not fail otherwise."""
        try:
            job()
        except grpc.RpcError as error:
            if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                self.failure = f"{name}: {error.code()}: {error.details()}"
            return False
        self.loop.acknowledged[name] += 1
        return True

    def upsert(self, layer: int, ids: Sequence[int], *, fsync: bool = False) -> None:
        with self.loop.lock:
            stamps = range(self.loop.stamp + 1, self.loop.stamp + 1 + len(ids))
            self.loop.stamp += len(ids)
            sources = [f"s{stamp // 500}" for stamp in stamps]
            facts: dict[int, Fact | None] = {
                i: Fact(stamp, source)
                for i, stamp, source in zip(ids, stamps, sources, strict=True)
            }
            self.loop.expected.begin(layer, facts)
        entries = admin_pb.Entries(
            ids=tensors.to_tensor(np.array(ids, np.uint64)),
            keys=tensors.to_tensor(key_of(ids, stamps)),
            logit_deltas=tensors.to_tensor(value_of(ids, stamps)),
            provenance=[types_pb.Provenance(source=source) for source in sources],
        )
        request = admin_pb.UpsertRequest(
            memory=NAME,
            layer=layer,
            entries=entries,
            model_digest=self.loop.digest,
            durability=admin_pb.DURABILITY_FSYNC if fsync else admin_pb.DURABILITY_PROCESS,
        )
        for _ in self.admin.Upsert(iter([request]), timeout=TIMEOUT_S):
            with self.loop.lock:
                self.loop.expected.acknowledge(layer, facts)

    def delete(self, layer: int, ids: list[int]) -> None:
        gone: dict[int, Fact | None] = dict.fromkeys(ids)
        with self.loop.lock:
            self.loop.expected.begin(layer, gone)
        request = retention_pb.DeleteRequest(
            memory=NAME, layer=layer, ids=tensors.to_tensor(np.array(ids, np.uint64))
        )
        self.retention.Delete(request, timeout=TIMEOUT_S)
        with self.loop.lock:
            self.loop.expected.acknowledge(layer, gone)

    def run_job(self, job: str) -> None:
        """One long call, or flush after flush."""
        if job == "flush":
            while self.attempt(job, self.flush):
                pass
        elif job != "none":
            self.attempt(job, getattr(self, job))

    def flush(self) -> None:
        """A write that is acknowledged when it would survive a loss of power, of entries that only this one writes."""
        layer, first = int(self.rng.integers(LAYERS)), int(self.rng.integers(self.loop.entries))
        ids = range(2 * self.loop.entries + first, 2 * self.loop.entries + first + 20)
        self.upsert(layer, ids, fsync=True)

    def optimize(self) -> None:
        request = admin_pb.OptimizeRequest(memory=NAME, quantization="none")  # small layers too
        _drain(self.admin.Optimize(request, timeout=TIMEOUT_S))

    def quantize(self) -> None:
        method = str(self.rng.choice(QUANTIZATIONS))
        request = admin_pb.OptimizeRequest(memory=NAME, quantization=method)
        _drain(self.admin.Optimize(request, timeout=TIMEOUT_S))

    def prune(self) -> None:
        """Forgets one source; what the writer writes meanwhile under the same ids stays."""
        with self.loop.lock:
            sources = sorted(
                {f.source for layer in self.loop.expected.layers for f in layer.values()}
            )
            source = str(self.rng.choice(sources))
            doomed = [
                {i: None for i, fact in layer.items() if fact.source == source}
                for layer in self.loop.expected.layers
            ]
            for layer, changes in enumerate(doomed):
                self.loop.expected.begin(layer, dict(changes))
            before = copy.deepcopy(self.loop.expected.layers)
        plan = retention_pb.PrunePlan(forget=[retention_pb.EntryFilter(source=source)])
        _drain(
            self.retention.Prune(
                retention_pb.PruneRequest(memory=NAME, plan=plan), timeout=TIMEOUT_S
            )
        )
        with self.loop.lock:
            for layer, changes in enumerate(doomed):
                untouched = {
                    i: None
                    for i in changes
                    if self.loop.expected.layers[layer].get(i) == before[layer][i]
                }
                pending = {
                    i for i in untouched if len(self.loop.expected.open.get((layer, i), set())) > 1
                }
                self.loop.expected.acknowledge(
                    layer, {i: None for i in untouched if i not in pending}
                )

    def snapshot(self) -> None:
        with self.loop.lock:
            state = copy.deepcopy(self.loop.expected.layers)
        stream = self.snapshots.CreateSnapshot(
            snapshots_pb.CreateSnapshotRequest(memory=NAME), timeout=TIMEOUT_S
        )
        names = [reply.snapshot.name for reply in stream if reply.HasField("snapshot")]
        if self.remember:
            self.loop.snapshots[names[0]] = state

    def restore(self) -> None:
        """Puts an acknowledged snapshot in the memory's place; nobody writes meanwhile."""
        if not self.loop.snapshots:
            return
        name = str(self.rng.choice(sorted(self.loop.snapshots)))
        state = copy.deepcopy(self.loop.snapshots[name])
        self.loop.expected.instead = state
        request = snapshots_pb.RestoreSnapshotRequest(
            snapshot=snapshots_pb.SnapshotRef(memory=NAME, name=name), as_memory=NAME, replace=True
        )
        _drain(self.snapshots.RestoreSnapshot(request, timeout=TIMEOUT_S))
        self.loop.expected.layers, self.loop.expected.instead = state, None


def _drain(stream: Any) -> None:
    for _ in stream:
        pass


def _exported(sidecar: Sidecar, layer: int) -> tuple[list[int], list[int], Any]:
    ids: list[int] = []
    stamps: list[int] = []
    keys = [np.empty((0, DIMENSION), np.float32)]
    request = admin_pb.ExportRequest(memory=NAME, layer=layer, batch_size=4096)
    for reply in sidecar.admin.Export(request, timeout=TIMEOUT_S):
        ids += tensors.to_array(reply.entries.ids).tolist()
        stamps += tensors.to_array(reply.entries.logit_deltas)[:, 0].astype(int).tolist()
        keys.append(tensors.to_array(reply.entries.keys))
    return ids, stamps, np.concatenate(keys)


def run(
    kills: int, seed: int, entries: int, data: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """The whole loop. Raises Violation."""
    loop = CrashLoop(data, entries, seed)
    loop.fill()
    for number in range(kills):
        job = loop.round(number)
        say(f"kill {number + 1}/{kills} during {job}; last restart {loop.restarts_s[-1]:.2f} s")
    with loop.start() as sidecar:
        loop.check(sidecar, deep=True)
        sidecar.stop_cleanly()
    return {
        "kills": kills,
        "kills_during": dict(loop.kills),
        "acknowledged": dict(loop.acknowledged),
        "entries_per_layer": entries,
        "restart_max_s": round(max(loop.restarts_s), 2),
        "restart_median_s": round(float(np.median(loop.restarts_s)), 2),
    }


def main() -> int:
    """Prints the result as JSON; status 1 when a promise was broken."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--entries", type=int, default=20_000, help="per layer")
    parser.add_argument(
        "--keep", type=Path, help="work here and leave the data when a promise was broken"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        data = (arguments.keep or Path(made)) / "data"
        try:
            result = run(arguments.kills, arguments.seed, arguments.entries, data, say)
        except Violation as violation:
            say(f"broken: {violation} (seed {arguments.seed})")
            return 1
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
