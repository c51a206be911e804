"""Copies that are kept in step: equal to what Export says, version by version, whatever happens meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from knnmoe import tensors
from knnmoe.client import (
    ClientClosed,
    MemoryNotFound,
    ModelMismatch,
    ReplicaBehind,
    ReplicaStream,
    ReplicationClient,
    ServiceError,
    ServiceRefused,
    ServiceUnavailable,
)
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from knnmoe.v1 import replication_pb2 as pb
from knnmoe.v1 import retention_pb2, retention_pb2_grpc, snapshots_pb2, snapshots_pb2_grpc
from knnmoe.v1 import types_pb2 as types_pb

from tests.engines import SERVERS, clean_server, url_of
from tests.integration.copies import Copy, fill, following, rows_of, stored
from tests.integration.replaced_memories import replace
from tests.integration.server_snapshots import until
from tests.sidecar import (
    ASSIGNMENT,
    CALL_TIMEOUT_S,
    COSINE,
    HIDDEN,
    LAYERS,
    LOGIT_DELTA,
    LOGITS,
    Sidecar,
    floats,
    make_fingerprint,
    random_entries,
    random_keys,
    running_sidecar,
)


def version_of(sidecar: Sidecar, name: str) -> int:
    return sidecar.describe(name).version


def ids_of(entries: admin_pb.Entries) -> list[int]:
    return tensors.to_array(entries.ids).tolist()


def delete(sidecar: Sidecar, name: str, layer: int, ids: list[int]) -> None:
    stub = retention_pb2_grpc.RetentionServiceStub(sidecar.channel)
    wanted = tensors.to_tensor(np.array(ids, np.uint64))
    request = retention_pb2.DeleteRequest(memory=name, layer=layer, ids=wanted)
    stub.Delete(request, timeout=CALL_TIMEOUT_S)


def change_settings(sidecar: Sidecar, name: str, **settings: Any) -> None:
    changed = types_pb.MemorySettings(**settings)
    request = admin_pb.UpdateSettingsRequest(memory=name, settings=changed)
    sidecar.admin.UpdateSettings(request, timeout=CALL_TIMEOUT_S)


def copied(sidecar: Sidecar, name: str, **wanted: Any) -> Copy:
    copy = Copy()
    with following(sidecar, name, **wanted) as stream:
        copy.sync(stream)
    return copy


def sync_now(sidecar: Sidecar, name: str, copy: Copy, stream: ReplicaStream) -> None:
    """Takes what has been acknowledged."""
    copy.sync(stream, version_of(sidecar, name))


@pytest.mark.parametrize("kind", [LOGIT_DELTA, ASSIGNMENT, LOGITS])
def test_a_copy_is_what_the_memory_holds(sidecar: Sidecar, name: str, kind: int) -> None:
    fill(sidecar, name, kind=kind)
    copy, described = copied(sidecar, name), sidecar.describe(name)
    assert copy.rows == stored(sidecar, name)
    assert (copy.position.epoch, copy.position.version) == (described.epoch, described.version)
    assert copy.start.memory.settings == described.settings
    assert copy.start.entries == copy.upserted == 60 * LAYERS
    assert bool(copy.start.foreign_writes_after_ms) == (sidecar.data.name == "standin")


def test_every_change_arrives_with_its_version(sidecar: Sidecar, name: str) -> None:
    fill(sidecar, name)
    copy, more = Copy(), random_entries(LOGIT_DELTA, 30, seed=9, first_id=40)  # 21 replace others
    with following(sidecar, name, heartbeat_ms=60_000) as stream:
        copy.sync(stream)
        sidecar.upsert(name, 1, more)
        sync_now(sidecar, name, copy, stream)
        assert copy.rows == stored(sidecar, name)
        delete(sidecar, name, 2, ids_of(more)[:5])
        sync_now(sidecar, name, copy, stream)
        assert copy.rows == stored(sidecar, name)
        change_settings(sidecar, name, neighbours=7)
        sync_now(sidecar, name, copy, stream)
        assert copy.settings == sidecar.describe(name).settings
    assert len(copy.rows[2]) == 55


def test_only_the_wanted_layers(ram_sidecar: Sidecar, name: str) -> None:
    fill(ram_sidecar, name)
    copy = Copy()
    with following(ram_sidecar, name, layers=[2], heartbeat_ms=60_000) as stream:
        copy.sync(stream)
        ram_sidecar.upsert(name, 0, random_entries(LOGIT_DELTA, 5, seed=9))
        sync_now(ram_sidecar, name, copy, stream)  # of that version, without the other layer
    everything = stored(ram_sidecar, name)
    assert copy.rows == {0: {}, 1: {}, 2: everything[2]}


class Writer:
    """One write after the other, each of new and old entries, and what the layers hold after each."""

    def __init__(self, sidecar: Sidecar, name: str) -> None:
        self.sidecar, self.name = sidecar, name
        self.states = [stored(sidecar, name)]
        self.done = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self._thread.join()

    def _run(self) -> None:
        number = 0
        while not self.done.is_set():
            number += 1
            layer, first = number % LAYERS, 1 + 7 * (number % 40)
            entries = random_entries(LOGIT_DELTA, 20, seed=number, first_id=first)
            before = self.states[-1]
            self.states.append(before | {layer: before[layer] | rows_of(entries)})
            self.sidecar.upsert(self.name, layer, entries)


def test_while_others_write_a_copy_is_of_one_moment_at_each_sync(
    sidecar: Sidecar, name: str
) -> None:
    fill(sidecar, name)
    copy, last = Copy(), 0
    with Writer(sidecar, name) as writer, following(sidecar, name) as stream:
        for _ in range(4):
            copy.sync(stream, last + 1)
            last = copy.position.version
            assert copy.rows in writer.states
        writer.done.set()
        writer._thread.join()
        sync_now(sidecar, name, copy, stream)
    assert copy.rows == writer.states[-1] == stored(sidecar, name)


def test_a_copy_that_was_cut_off_goes_on(sidecar: Sidecar, name: str) -> None:
    fill(sidecar, name)
    copy = copied(sidecar, name)
    more = random_entries(LOGIT_DELTA, 3, seed=9)
    sidecar.upsert(name, 1, more)
    delete(sidecar, name, 0, ids_of(more)[:1])
    change_settings(sidecar, name, neighbours=3)
    copy.upserted = 0
    with following(sidecar, name, after=copy.position) as stream:
        sync_now(sidecar, name, copy, stream)
    assert copy.rows == stored(sidecar, name)
    assert (copy.upserted, copy.deleted) == (3, 1)
    assert copy.settings.neighbours == 3


def test_a_copy_that_is_behind_gets_what_differs(sidecar: Sidecar, name: str) -> None:
    fill(sidecar, name)
    copy = copied(sidecar, name)
    foreign = pb.ReplicaPosition(epoch="another", version=copy.position.version)
    with following(sidecar, name, after=foreign) as stream, pytest.raises(ReplicaBehind):
        next(stream)
    early = pb.ReplicaPosition(epoch=copy.position.epoch, version=10**6)
    with following(sidecar, name, after=early) as stream, pytest.raises(ReplicaBehind):
        next(stream)
    more = random_entries(LOGIT_DELTA, 4, seed=9, first_id=58)  # 3 replace others
    sidecar.upsert(name, 1, more)
    delete(sidecar, name, 2, ids_of(more)[:2])
    copy.upserted = 0
    with following(sidecar, name, held=copy.held()) as stream:
        copy.sync(stream)
    assert copy.rows == stored(sidecar, name)
    assert (copy.upserted, copy.deleted) == (4, 2)


def test_after_sigkill_only_what_differs_is_sent(data: Path) -> None:
    with Sidecar(data) as sidecar:
        fill(sidecar, "m")
        copy = copied(sidecar, "m")
        sidecar.upsert("m", 1, random_entries(LOGIT_DELTA, 4, seed=9))
        sidecar.kill()
    with running_sidecar(data) as sidecar:
        with following(sidecar, "m", after=copy.position) as stream, pytest.raises(ReplicaBehind):
            next(stream)
        copy.upserted = 0
        with following(sidecar, "m", held=copy.held()) as stream:
            copy.sync(stream)
        assert copy.rows == stored(sidecar, "m")
        assert (copy.upserted, copy.deleted) == (4, 0)


def test_a_memory_that_is_replaced_under_it(sidecar: Sidecar, name: str) -> None:
    fill(sidecar, name)
    fill(sidecar, f"{name}-2", rows=40, neighbours=7)
    sidecar.upsert(f"{name}-2", 0, random_entries(LOGIT_DELTA, 10, seed=9))
    copy, other = Copy(), Copy()
    with (
        following(sidecar, name, heartbeat_ms=60_000) as stream,
        following(sidecar, f"{name}-2", heartbeat_ms=60_000) as of_other,
    ):
        copy.sync(stream)
        other.sync(of_other)
        replace(sidecar, name, f"{name}-2")
        for each, kept in ((stream, copy), (of_other, other)):
            with pytest.raises((ReplicaBehind, ServiceUnavailable)):
                kept.sync(each, least=10**9)
    with following(sidecar, f"{name}-2", held=other.held()) as gone, pytest.raises(MemoryNotFound):
        next(gone)
    copy.upserted = 0
    with following(sidecar, name, held=copy.held()) as stream:
        copy.sync(stream)
    assert copy.rows == stored(sidecar, name)
    assert copy.settings.neighbours == 7
    assert copy.upserted == 40 * LAYERS  # written at another time
    assert copy.deleted == 20 * LAYERS


def test_a_memory_that_is_deleted_and_made_again(sidecar: Sidecar, name: str) -> None:
    fill(sidecar, name)
    copy = Copy()
    with following(sidecar, name, heartbeat_ms=60_000) as stream:
        copy.sync(stream)
        request = admin_pb.DeleteMemoryRequest(memory=name)
        sidecar.admin.DeleteMemory(request, timeout=CALL_TIMEOUT_S)
        with pytest.raises(ReplicaBehind, match="deleted"):
            copy.sync(stream, least=10**9)
    with following(sidecar, name, held=copy.held()) as stream, pytest.raises(MemoryNotFound):
        next(stream)
    fill(sidecar, name, rows=1)
    with following(sidecar, name, held=copy.held()) as stream:
        copy.sync(stream)
    assert copy.rows == stored(sidecar, name)


@pytest.fixture
def snapshot(edge_sidecar: Sidecar, name: str) -> snapshots_pb2.SnapshotRef:
    fill(edge_sidecar, name)
    snapshots = snapshots_pb2_grpc.SnapshotServiceStub(edge_sidecar.channel)
    request = snapshots_pb2.CreateSnapshotRequest(memory=name, name="s")
    list(snapshots.CreateSnapshot(request, timeout=CALL_TIMEOUT_S))
    return snapshots_pb2.SnapshotRef(memory=name, name="s")


def test_a_snapshot_that_is_restored_in_place(
    edge_sidecar: Sidecar, name: str, snapshot: snapshots_pb2.SnapshotRef
) -> None:
    edge_sidecar.upsert(name, 1, random_entries(LOGIT_DELTA, 5, seed=9))
    copy = Copy()
    with following(edge_sidecar, name, heartbeat_ms=60_000) as stream:
        copy.sync(stream)
        snapshots = snapshots_pb2_grpc.SnapshotServiceStub(edge_sidecar.channel)
        request = snapshots_pb2.RestoreSnapshotRequest(
            snapshot=snapshot, as_memory=name, replace=True
        )
        list(snapshots.RestoreSnapshot(request, timeout=CALL_TIMEOUT_S))
        with pytest.raises(ReplicaBehind):
            copy.sync(stream, least=10**9)
    copy.upserted = 0
    with following(edge_sidecar, name, held=copy.held()) as stream:
        copy.sync(stream)
    assert copy.rows == stored(edge_sidecar, name)
    assert copy.upserted == 5


@pytest.mark.parametrize("kind", [LOGIT_DELTA, ASSIGNMENT, LOGITS])
@pytest.mark.parametrize("dtype", [types_pb.DTYPE_F16, types_pb.DTYPE_BF16, types_pb.DTYPE_I8])
def test_keys_in_fewer_bytes(ram_sidecar: Sidecar, name: str, kind: int, dtype: int) -> None:
    fill(ram_sidecar, name, kind=kind, similarity=COSINE)
    keys: dict[int, Any] = {}
    with following(ram_sidecar, name, layers=[1], key_dtype=dtype) as stream:
        for message in stream:
            if message.HasField("synced"):
                break
            if message.HasField("upserted"):
                entries = message.upserted
                assert entries.keys.dtype == dtype
                found = tensors.to_array(entries.keys).astype(np.float32)
                if dtype == types_pb.DTYPE_I8:
                    found *= tensors.to_array(entries.scales)[:, None]
                keys |= dict(zip(ids_of(entries), found, strict=True))
    exact = {n: np.frombuffer(key, "<f4") for n, (key, _) in stored(ram_sidecar, name)[1].items()}
    assert keys.keys() == exact.keys()
    # Half a step: 2^-11 and 2^-8 of a number below 1, 1/254 of the largest, which is below 1 too.
    step = {types_pb.DTYPE_F16: 2**-11, types_pb.DTYPE_BF16: 2**-8, types_pb.DTYPE_I8: 1 / 254}
    for number, key in exact.items():
        np.testing.assert_allclose(keys[number], key, rtol=0, atol=step[dtype])


def test_the_examples_of_entries_travel(ram_sidecar: Sidecar, name: str) -> None:
    fill(ram_sidecar, name)
    with following(ram_sidecar, name, layers=[0]) as stream:
        entries = next(each.upserted for each in stream if each.HasField("upserted"))
    origins = dict(zip(ids_of(random_entries(LOGIT_DELTA, 60)), range(60), strict=True))
    numbers = tensors.to_array(entries.example_numbers).tolist()
    assert len(entries.examples) == 10
    for entry, number in zip(ids_of(entries), numbers, strict=True):
        row, example = origins[entry], entries.examples[number]
        assert (example.source, example.example) == (f"text-{row % 2}", f"example-{row % 10}")


def refused(sidecar: Sidecar, name: str, **wanted: Any) -> ServiceError:
    with following(sidecar, name, **wanted) as stream, pytest.raises(ServiceError) as caught:
        Copy().sync(stream)
    return caught.value


@pytest.mark.parametrize(
    ("wanted", "field"),
    [
        ({"key_dtype": types_pb.DTYPE_U64}, "key_dtype"),
        ({"key_dtype": 77}, "key_dtype"),
        ({"heartbeat_ms": 19}, "heartbeat_ms"),
        ({"heartbeat_ms": 60_001}, "heartbeat_ms"),
        ({"held": {0: ([2, 1], [0, 0])}}, "held[0].ids"),
        ({"held": {0: ([1, 1], [0, 0])}}, "held[0].ids"),
        ({"held": {0: ([1, 2], [0])}}, "held[0].digests"),
        ({"held": {1: ([1], [0])}, "layers": [0]}, "held[0].layer"),
        ({"held": {0: ([1], [0])}, "after": pb.ReplicaPosition()}, "held"),
    ],
)
def test_requests_that_are_refused(
    ram_sidecar: Sidecar, name: str, wanted: dict[str, Any], field: str
) -> None:
    fill(ram_sidecar, name, rows=2)
    for layer, pair in wanted.get("held", {}).items():
        wanted["held"][layer] = tuple(np.array(column, np.uint64) for column in pair)
    error = refused(ram_sidecar, name, **wanted)
    assert isinstance(error, ServiceRefused)
    assert error.metadata["field"] == field


def test_a_memory_layer_or_model_that_is_not_there(ram_sidecar: Sidecar, name: str) -> None:
    fill(ram_sidecar, name, rows=2)
    assert isinstance(refused(ram_sidecar, "nowhere"), MemoryNotFound)
    error = refused(ram_sidecar, name, layers=[LAYERS])
    assert error.reason == "ERROR_REASON_LAYER_NOT_FOUND"
    other = make_fingerprint(router_hash="0" * 64)
    with (
        ReplicationClient(ram_sidecar.target, name, other) as client,
        pytest.raises(ModelMismatch, match="router_hash"),
    ):
        next(client.replicate())


def test_a_key_beyond_f16_is_named(ram_sidecar: Sidecar, name: str) -> None:
    fill(ram_sidecar, name)
    entries = random_entries(LOGIT_DELTA, 1, first_id=500)
    entries.keys.CopyFrom(floats(np.full((1, HIDDEN), 7e4)))
    ram_sidecar.upsert(name, 2, entries)
    error = refused(ram_sidecar, name, key_dtype=types_pb.DTYPE_F16)
    assert error.metadata["field"] == "key_dtype"
    assert f"70000 in the key of entry {ids_of(entries)[0]} of layer 2" in str(error)
    assert "bf16" in error.metadata["expected"]
    assert copied(ram_sidecar, name, key_dtype=types_pb.DTYPE_BF16).upserted == 181


@pytest.mark.parametrize("engine", SERVERS)
def test_what_another_service_writes_is_found(
    engine: str, request: pytest.FixtureRequest, data: Path
) -> None:
    with clean_server(url_of(engine, request)) as options:
        flags = ["--qdrant-prefix", options.prefix, "--qdrant-timeout-s", "30"]
        with (
            running_sidecar(data, backend=options.url, flags=flags) as one,
            running_sidecar(data.parent / "other", backend=options.url, flags=flags) as other,
        ):
            fill(one, "m")
            copy = Copy()
            with following(one, "m") as stream:
                copy.sync(stream)
                assert copy.start.foreign_writes_after_ms >= 1000
                other.upsert("m", 1, random_entries(LOGIT_DELTA, 3, seed=9))
                copy.sync(stream, copy.position.version + 1)
                assert copy.rows == stored(one, "m")
            # While nobody follows
            delete(other, "m", 1, ids_of(random_entries(LOGIT_DELTA, 2)))
            with following(one, "m", after=copy.position) as stream:
                copy.sync(stream)
            assert copy.rows == stored(one, "m")
            assert copy.deleted == 2


WIDE = {"num_layers": 1, "hidden_size": 1024}


@pytest.fixture
def wide(data: Path) -> Iterator[Sidecar]:
    """A service that would wait long for calls at its stop, and 32 MiB of keys in it."""
    with Sidecar(data, backend="exact", flags=["--drain-s", "3600"]) as sidecar:
        digest = sidecar.create("wide", model=WIDE)
        for first in (0, 4000):
            write_wide(sidecar, digest, first, 4000)
        yield sidecar


def write_wide(sidecar: Sidecar, digest: str, first: int, rows: int) -> None:
    rng = np.random.default_rng(first)
    entries = admin_pb.Entries(
        ids=tensors.to_tensor(np.arange(first, first + rows, dtype=np.uint64)),
        keys=floats(random_keys(rng, rows, 1024)),
        logit_deltas=floats(random_keys(rng, rows, 8)),
    )
    request = admin_pb.UpsertRequest(memory="wide", entries=entries, model_digest=digest)
    [_] = sidecar.admin.Upsert(iter([request]), timeout=CALL_TIMEOUT_S)


def test_a_client_that_does_not_read_holds_nobody_up(wide: Sidecar) -> None:
    with ReplicationClient(wide.target, "wide", make_fingerprint(**WIDE)) as client:
        stream = client.replicate()
        next(stream)
        write_wide(wide, wide.describe("wide").model_digest, 8000, 2)
        wide.stop_cleanly()  # which fails when it takes longer than a minute


def test_a_copy_ends_when_the_service_stops(data: Path) -> None:
    with Sidecar(data, backend="exact", flags=["--drain-s", "3600"]) as sidecar:
        fill(sidecar, "m", rows=2)
        with following(sidecar, "m", heartbeat_ms=60_000) as stream:
            Copy().sync(stream)
            sidecar.stop_cleanly()
            with pytest.raises(ServiceUnavailable) as caught:
                Copy().sync(stream)
    assert caught.value.reason == "ERROR_REASON_SHUTTING_DOWN"


def test_there_is_room_for_so_many_copies(ram_sidecar: Sidecar, name: str) -> None:
    fill(ram_sidecar, name, rows=2)
    with (
        ExitStack() as copies,
        ReplicationClient(ram_sidecar.target, name, make_fingerprint()) as c,
    ):
        streams = [c.replicate(heartbeat_ms=60_000) for _ in range(64)]
        for stream in streams:
            copies.callback(stream.cancel)
            Copy().sync(stream)
        error = refused(ram_sidecar, name)
        assert error.reason == "ERROR_REASON_OVERLOADED"
        assert ram_sidecar.describe(name).name == name
        streams[0].cancel()
        assert list(streams[0]) == []
        until(lambda: is_room(ram_sidecar, name))


def is_room(sidecar: Sidecar, name: str) -> bool:
    with following(sidecar, name) as stream:
        try:
            return next(stream).HasField("start")
        except ServiceUnavailable as error:
            if error.reason != "ERROR_REASON_OVERLOADED":
                raise
            return False


def report(layer: int, ids: list[int], hits: list[int], **counted: Any) -> pb.LayerHits:
    columns = [tensors.to_tensor(np.array(column, np.uint64)) for column in (ids, hits)]
    return pb.LayerHits(layer=layer, ids=columns[0], hits=columns[1], **counted)


def test_reported_hits_count_like_those_of_route(sidecar: Sidecar, name: str) -> None:
    fill(sidecar, name)
    digest, ids = sidecar.describe(name).model_digest, ids_of(random_entries(LOGIT_DELTA, 60))
    counted = {"lookups": 2, "tokens": 10, "tokens_abstained": 4, "lambda_sum": 3.0}
    with ReplicationClient(sidecar.target, name, make_fingerprint()) as client:
        layers = [report(1, [ids[3], 12345, ids[0]], [5, 7, 1], **counted)]
        for number in (1, 1, 2, 1):  # each counts once
            client.report_hits(digest, layers, number)
    request = admin_pb.StatsRequest(memory=name)
    found = sidecar.admin.Stats(request, timeout=CALL_TIMEOUT_S).memories[0].layers
    assert (found[1].hits, found[1].entries_never_hit) == (12, 58)
    assert (found[1].route_requests, found[1].tokens, found[1].tokens_abstained) == (4, 20, 8)
    assert found[1].mean_lambda == pytest.approx(0.3)
    assert (found[0].hits, found[0].tokens) == (0, 0)
    assert found[1].mean_search_ms == 0  # nothing was searched here


def test_a_report_whose_answer_was_lost_counts_once_after_a_restart(tmp_path: Path) -> None:
    """After a stop what was counted is saved, and its number with it."""
    counted = {"lookups": 1, "tokens": 1, "lambda_sum": 1.0}
    with Sidecar(tmp_path / "data") as first:
        fill(first, "m", rows=4)
        digest, ids = first.describe("m").model_digest, ids_of(random_entries(LOGIT_DELTA, 4))
        client = ReplicationClient(first.target, "m", make_fingerprint())
        client.report_hits(digest, [report(1, [ids[0]], [3], **counted)], 7)
        first.stop_cleanly()
    with client, Sidecar(tmp_path / "data", listen=first.target) as again:
        for number in (7, 8):
            client.report_hits(digest, [report(1, [ids[0]], [3], **counted)], number)
        request = admin_pb.StatsRequest(memory="m")
        found = again.admin.Stats(request, timeout=CALL_TIMEOUT_S).memories[0].layers[1]
    assert (found.hits, found.tokens) == (6, 1)


def test_a_client_that_is_closed(ram_sidecar: Sidecar, name: str) -> None:
    fill(ram_sidecar, name, rows=2)
    client = ReplicationClient(ram_sidecar.target, name, make_fingerprint())
    stream = client.replicate(heartbeat_ms=60_000)
    Copy().sync(stream)
    closing = threading.Thread(target=client.close)
    closing.start()
    with pytest.raises(ClientClosed):
        next(stream)
    closing.join()
    with pytest.raises(ClientClosed):
        client.replicate()


@pytest.mark.parametrize(
    ("layer", "field"),
    [
        (report(0, [1, 1], [1, 1]), "layers[0].ids[1]"),
        (report(0, [1], [1, 1]), "layers[0].hits"),
        (report(0, [1], [2**50]), "layers[0].hits"),
        (report(0, [], [], tokens=2**63), "layers[0].tokens"),
        (report(0, [], [], lambda_sum=float("nan")), "layers[0].lambda_sum"),
        (report(0, [], [], lambda_sum=-1.0), "layers[0].lambda_sum"),
        (report(0, [], [], tokens=2, lambda_sum=2.1), "layers[0].lambda_sum"),
        (report(0, [], [], tokens=2, tokens_abstained=3), "layers[0].tokens_abstained"),
    ],
)
def test_reports_that_are_refused(
    ram_sidecar: Sidecar, name: str, layer: pb.LayerHits, field: str
) -> None:
    fill(ram_sidecar, name, rows=2)
    digest = ram_sidecar.describe(name).model_digest
    with (
        ReplicationClient(ram_sidecar.target, name, make_fingerprint()) as client,
        pytest.raises(ServiceRefused) as caught,
    ):
        client.report_hits(digest, [layer], 1)
    assert caught.value.metadata["field"] == field
    with (
        ReplicationClient(ram_sidecar.target, name, make_fingerprint()) as client,
        pytest.raises(ModelMismatch),
    ):
        client.report_hits("0" * 64, [], 1)
