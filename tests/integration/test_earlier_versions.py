"""What earlier versions left on disk opens today, and answers as it did: files made by tests/fixtures/make.py.

Ids, counts, stored numbers and squared distances must be the same bit for bit. Numbers that pass through exp and sums,
and cosine distances, may differ in their last bits from one processor to another.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.json_format import ParseDict
from knnmoe import tensors
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from knnmoe.v1 import routing_pb2 as routing_pb
from knnmoe.v1 import types_pb2 as types_pb
from numpy.typing import NDArray

from tests.integration.admin_runs import admin_of
from tests.sidecar import CALL_TIMEOUT_S, COSINE, Sidecar, running_sidecar

FIXTURES = Path(__file__).parents[1] / "fixtures"
VERSIONS = sorted(path.parent.name for path in FIXTURES.glob("*/answers.json"))
NAMES = ("assignments", "cosines", "deltas")
SNAPSHOT = "monday"
TOLERANCE = 1e-6
_NUMBERS = count()

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Frozen:
    """The files and answers of a version."""

    archive: Path
    answers: dict[str, Any]
    exports: Path
    packed: Path

    @contextmanager
    def copy(self, directory: str, under: Path) -> Iterator[Path]:
        """`data` or `killed`, unpacked once more; removed afterwards."""
        root = under / f"earlier-{next(_NUMBERS)}"
        try:
            yield unpacked(self.archive, root, directory)
        finally:
            shutil.rmtree(root)

    def rows(self, name: str) -> Rows:
        """The entries in a .jsonl file of exports/."""
        return rows_in(self.exports / f"{name}.jsonl")


@pytest.fixture(scope="module", params=VERSIONS)
def frozen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Frozen:
    directory, root = FIXTURES / request.param, tmp_path_factory.mktemp("earlier")
    archive = directory / "files.tar.xz"
    answers = json.loads((directory / "answers.json").read_text(encoding="utf-8"))
    assert answers["version"] == request.param
    exports, packed = (unpacked(archive, root, name) for name in ("exports", "packed"))
    return Frozen(archive, answers, exports, packed)


@dataclass(frozen=True)
class Served:
    """A service on a copy of data/, and what it said of hits before anybody asked it for anything."""

    sidecar: Sidecar
    hits: dict[str, list[list[int]]]


@pytest.fixture(scope="module")
def served(frozen: Frozen, fast_dir: Path) -> Iterator[Served]:
    with frozen.copy("data", fast_dir) as data, running_sidecar(data) as sidecar:
        yield Served(sidecar, hits_of(sidecar))


@pytest.fixture
def new_name() -> str:
    """The name of a memory that the frozen version did not make."""
    return f"new-{next(_NUMBERS)}"


@pytest.mark.parametrize("directory", ["data", "killed"])
def test_the_doctor_finds_only_that_others_can_enter(
    frozen: Frozen, directory: str, fast_dir: Path
) -> None:
    with frozen.copy(directory, fast_dir) as data:
        found = admin_of("nowhere:1")("doctor", "--deep", "--data", data)
    worse = [found for found in found["findings"] if found["severity"] != "ok"]
    of_files = [finding for finding in worse if finding["check"] != "disk"]
    assert [finding["check"] for finding in of_files] in ([], ["access"]), of_files  # by umask


def test_memories_settings_and_hits(frozen: Frozen, served: Served) -> None:
    expected = frozen.answers["data"]
    request = admin_pb.ListMemoriesRequest()
    listed = served.sidecar.admin.ListMemories(request, timeout=CALL_TIMEOUT_S).memories
    frozen_by_name = {name: memory_of(memory) for name, memory in expected["memories"].items()}
    assert {m.name: lasting(m) for m in listed if m.name in NAMES} == frozen_by_name
    assert served.hits == expected["hits"]


@pytest.mark.parametrize("name", NAMES)
def test_entries_and_answers(frozen: Frozen, served: Served, name: str, tmp_path: Path) -> None:
    rows = frozen.rows(f"data.{name}")
    assert_entries(served.sidecar, name, rows, tmp_path)
    assert_answers(served.sidecar, name, frozen.answers["data"]["answers"][name], rows)


@pytest.mark.parametrize("name", NAMES)
def test_snapshots_are_whole(frozen: Frozen, served: Served, name: str) -> None:
    admin = admin_of(served.sidecar.target)
    expected = frozen.answers["at_snapshot"][name]["snapshot"]
    [listed] = admin("snapshot", "list", name)["snapshots"]
    of_archive = admin("snapshot", "verify", name, frozen.packed / f"{name}.tar")
    for found in (listed, admin("snapshot", "verify", name, SNAPSHOT), of_archive):
        assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize("packed", [False, True], ids=["directory", "packed"])
@pytest.mark.parametrize("name", NAMES)
def test_a_snapshot_restored_as_a_copy(
    frozen: Frozen, served: Served, name: str, packed: bool, new_name: str, tmp_path: Path
) -> None:
    snapshot = frozen.packed / f"{name}.tar" if packed else SNAPSHOT
    admin_of(served.sidecar.target)("snapshot", "restore", name, snapshot, "--as", new_name)
    assert_as_at_snapshot(served.sidecar, new_name, frozen, name, tmp_path)


def test_snapshots_restored_in_place(frozen: Frozen, fast_dir: Path, tmp_path: Path) -> None:
    with frozen.copy("data", fast_dir) as data:
        with running_sidecar(data) as sidecar:
            before = hits_of(sidecar)
            for name in NAMES:
                restore = ("snapshot", "restore", name, SNAPSHOT, "--replace", "--yes")
                admin_of(sidecar.target)(*restore)
            assert only_hits(hits_of(sidecar)) == only_hits(before)
        with running_sidecar(data) as sidecar:
            assert only_hits(hits_of(sidecar)) == only_hits(before)
            for name in NAMES:
                assert_as_at_snapshot(sidecar, name, frozen, name, tmp_path)
        assert admin_of("nowhere:1")("doctor", "--deep", "--data", data)["sound"]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "safetensors"])
@pytest.mark.parametrize("name", NAMES)
def test_exported_files_make_the_same_memory(
    frozen: Frozen, served: Served, name: str, suffix: str, new_name: str, tmp_path: Path
) -> None:
    """Without an index: the frozen answers are exact ones."""
    file = frozen.exports / f"data.{name}.{suffix}"
    flags = ("--fingerprint", file.with_suffix(".json")) if suffix == "jsonl" else ()
    admin_of(served.sidecar.target)("import", file, "--as", new_name, *flags)
    rows, expected = (
        frozen.rows(f"data.{name}"),
        memory_of(frozen.answers["data"]["memories"][name]),
    )
    made = served.sidecar.describe(new_name)
    assert (made.fingerprint, made.settings) == (expected.fingerprint, expected.settings)
    assert_entries(served.sidecar, new_name, rows, tmp_path)
    assert_answers(served.sidecar, new_name, frozen.answers["data"]["answers"][name], rows)


def test_a_service_that_was_killed(frozen: Frozen, fast_dir: Path, tmp_path: Path) -> None:
    expected, rows = frozen.answers["killed"], frozen.rows("killed.deltas")
    with frozen.copy("killed", fast_dir) as data, running_sidecar(data) as sidecar:
        assert hits_of(sidecar) == expected["hits"]
        assert lasting(sidecar.describe("deltas")) == memory_of(expected["memories"]["deltas"])
        assert_entries(sidecar, "deltas", rows, tmp_path)
        assert_answers(sidecar, "deltas", expected["answers"]["deltas"], rows)


def test_memories_that_change_and_are_indexed_again(
    frozen: Frozen, fast_dir: Path, tmp_path: Path
) -> None:
    with frozen.copy("data", fast_dir) as data:
        with running_sidecar(data) as sidecar:
            admin = admin_of(sidecar.target)
            for name in NAMES:
                assert admin("delete", name, "--source", "kjv.txt", "--yes")["deleted"]
                admin("upsert", name, frozen.exports / f"data.{name}.jsonl")
                admin("optimize", name)
        with running_sidecar(data) as sidecar:
            for name in NAMES:
                rows = frozen.rows(f"data.{name}")
                assert_entries(sidecar, name, rows, tmp_path)
                assert_answers(sidecar, name, frozen.answers["data"]["answers"][name], rows)


def test_migration_of_a_data_directory(frozen: Frozen, fast_dir: Path, tmp_path: Path) -> None:
    with (
        frozen.copy("data", fast_dir) as data,
        running_sidecar(data.with_name("target")) as sidecar,
    ):
        admin_of(sidecar.target)("migrate", "--from", data, "--to", "embedded")
        for name in NAMES:
            rows = frozen.rows(f"data.{name}")
            assert_entries(sidecar, name, rows, tmp_path)
            assert_answers(sidecar, name, frozen.answers["data"]["answers"][name], rows)


def unpacked(archive: Path, root: Path, directory: str) -> Path:
    """One of the directories of an archive; holes in files stay holes."""
    with tarfile.open(archive) as tar:
        members = [member for member in tar if member.name.split("/")[0] == directory]
        # Python before 3.11.4, Debian 12's for one, has no filters.
        tar.extraction_filter = getattr(tarfile, "data_filter", None)
        tar.extractall(root, members)  # noqa: S202
    return root / directory


def rows_in(file: Path) -> Rows:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def memory_of(document: dict[str, Any]) -> routing_pb.MemoryDescription:
    return ParseDict(document, routing_pb.MemoryDescription())


def lasting(memory: routing_pb.MemoryDescription) -> routing_pb.MemoryDescription:
    """Without the epoch, which is another at each start."""
    memory.ClearField("epoch")
    return memory


def only_hits(of_layers: dict[str, list[list[int]]]) -> dict[str, list[int]]:
    """Without the numbers of entries, which a restored snapshot changes."""
    return {name: [hits for _, hits, _ in layers] for name, layers in of_layers.items()}


def hits_of(sidecar: Sidecar) -> dict[str, list[list[int]]]:
    """Of each memory and layer: entries, hits, entries that were never hit."""
    stats = sidecar.admin.Stats(admin_pb.StatsRequest(), timeout=CALL_TIMEOUT_S)
    return {
        memory.memory: [[of.entries, of.hits, of.entries_never_hit] for of in memory.layers]
        for memory in stats.memories
    }


def assert_as_at_snapshot(
    sidecar: Sidecar, served_as: str, frozen: Frozen, name: str, tmp_path: Path
) -> None:
    """But for name, version and time, the memory `served_as` is what `name` was when its snapshot was made."""
    then, rows = frozen.answers["at_snapshot"][name], frozen.rows(f"snapshot.{name}")
    expected, got = memory_of(then["memory"]), sidecar.describe(served_as)
    for field in ("name", "version", "epoch", "created_unix_ms"):
        got.ClearField(field)
        expected.ClearField(field)
    assert got == expected
    assert_entries(sidecar, served_as, rows, tmp_path)
    assert_answers(sidecar, served_as, then["answers"], rows)


def assert_entries(sidecar: Sidecar, name: str, rows: Rows, tmp_path: Path) -> None:
    """All of the memory, bit for bit; fields that came later do not count."""
    file = tmp_path / f"{name}-{next(_NUMBERS)}.jsonl"
    admin_of(sidecar.target)("export", name, file)
    found = rows_in(file)
    assert len(found) == len(rows)
    for got, expected in zip(found, rows, strict=True):
        assert got | expected == got


def assert_answers(sidecar: Sidecar, name: str, answers: list[Any], rows: Rows) -> None:
    """Lookups in the memory `name` get the frozen answers; neighbours come from where `rows` say."""
    exact_distances = sidecar.describe(name).settings.similarity != COSINE
    origins = {(row["layer"], row["id"]): origin_of(row) for row in rows}
    for answer in answers:
        request = ParseDict(answer["request"], routing_pb.RouteRequest())
        request.memory = name
        got = sidecar.route(request)
        assert_response(
            got, ParseDict(answer["response"], routing_pb.RouteResponse()), exact_distances
        )
        for number, origin in got.neighbours.provenance.items():
            assert origin == origins[request.layer, number]


def origin_of(row: dict[str, Any]) -> types_pb.Provenance:
    fields = types_pb.Provenance.DESCRIPTOR.fields_by_name
    return types_pb.Provenance(**{key: value for key, value in row.items() if key in fields})


def assert_response(
    got: routing_pb.RouteResponse, expected: routing_pb.RouteResponse, exact_distances: bool
) -> None:
    assert got.request_id == expected.request_id
    found, wanted = arrays_of(got), arrays_of(expected)
    assert found.keys() == wanted.keys()
    for field, array in wanted.items():
        whole = array.dtype.kind in "iu" or (exact_distances and field == "squared_distances")
        tolerance = 0.0 if whole else TOLERANCE
        np.testing.assert_allclose(
            found[field], array, rtol=tolerance, atol=tolerance, err_msg=field, strict=True
        )


def arrays_of(response: routing_pb.RouteResponse) -> dict[str, NDArray[Any]]:
    """The tensors that are there, by name."""
    found = {
        "experts": response.assignment.experts,
        "weights": response.assignment.weights,
        "router_logits": response.router_logits,
        "lambdas": response.lambdas,
        "abstained": response.abstained,
        "ids": response.neighbours.ids,
        "squared_distances": response.neighbours.squared_distances,
        "similarities": response.neighbours.similarities,
    }
    return {field: tensors.to_array(tensor) for field, tensor in found.items() if tensor.dtype}
