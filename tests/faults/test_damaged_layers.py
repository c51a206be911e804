"""A layer whose files were damaged: it is set apart by name, everything else goes on, and a snapshot brings it back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from grpc import StatusCode
from knnmoe import tensors
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from typer.testing import CliRunner

from router_service.backends.disk import copy_tree
from router_service.cli.admin import app
from tests.congruence.fast_dir import fast_dir, ram_dir
from tests.sidecar import (
    EXPERTS,
    LOGIT_DELTA,
    Sidecar,
    exported,
    random_entries,
    random_keys,
    refusal,
    route_request,
    running_sidecar,
)

__all__ = ["fast_dir"]

# Nothing is indexed or flushed by itself meanwhile, and layers have engine processes.
FLAGS = ["--optimize-above-mib", "0", "--isolate-above-mib", "0", "--flush-interval-s", "3600"]


class Killed(NamedTuple):
    """What it left, and the logits of a lookup by memory and layer."""

    data: Path
    answers: dict[tuple[str, int], bytes]


def _admin(target: str, *words: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["--json", "--target", target, *map(str, words)])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout) if result.stdout else result.stderr


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killed]:
    """A service that was killed after it was filled; each test has a copy of its files."""
    with ram_dir(tmp_path_factory.mktemp("killed")) as directory:
        with Sidecar(directory / "data", flags=FLAGS) as sidecar:
            _fill(sidecar)
            answers = {
                (memory, layer): sidecar.route(_route(sidecar, memory, layer)).router_logits.data
                for memory in ("bible", "koran")
                for layer in (0, 1)
            }
            sidecar.kill()
        yield Killed(directory / "data", answers)


@pytest.fixture
def data(killed: Killed, fast_dir: Path) -> Path:
    copy_tree(killed.data, fast_dir / "data")
    return fast_dir / "data"


def _fill(sidecar: Sidecar) -> None:
    """Two memories of two layers, indexed, with a snapshot, and then newer entries."""
    for name in ("bible", "koran"):
        sidecar.create(name, kind=LOGIT_DELTA, gamma=[0.05], model={"num_layers": 2})
        for layer in (0, 1):
            sidecar.upsert(name, layer, random_entries(LOGIT_DELTA, 600, layer))
        _admin(sidecar.target, "quantize", name, "--method", "int8")
        for layer in (0, 1):
            sidecar.upsert(name, layer, random_entries(LOGIT_DELTA, 20, 5, first_id=1000))
        _admin(sidecar.target, "snapshot", "create", name, "--as", "monday")


def _route(sidecar: Sidecar, name: str, layer: int) -> Any:
    rng = np.random.default_rng(1)
    digest = sidecar.describe(name).model_digest
    inputs, logits = random_keys(rng, 3), random_keys(rng, 3, EXPERTS)
    return route_request(name, digest, inputs, logits, layer=layer)


def _flip(path: Path, byte: int) -> None:
    with path.open("r+b") as file:
        file.seek(byte)
        old = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([old ^ 4]))


def _file_of(data: Path, name: str) -> Path:
    [path] = (data / "memories" / "bible" / "layer-001").glob(f"gen-*/shard/segments/*/{name}")
    return path


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vector_storage/matrix.dat", "matrix.dat has other content"),
        ("vector_storage/vectors/chunk_0.mmap", "1 changed (id "),
        ("vector_index/links_compressed.bin", "links_compressed.bin has other content"),
    ],
)
def test_the_layer_is_set_apart_and_the_rest_goes_on(
    data: Path, killed: Killed, name: str, words: str
) -> None:
    _flip(_file_of(data, name), 1000)
    with running_sidecar(data, flags=FLAGS) as sidecar:
        for (memory, layer), logits in killed.answers.items():
            if (memory, layer) != ("bible", 1):
                answer = sidecar.route(_route(sidecar, memory, layer))
                assert answer.router_logits.data == logits
        upsert = admin_pb.UpsertRequest(
            memory="bible",
            layer=1,
            entries=random_entries(LOGIT_DELTA, 5, 7, first_id=5000),
            model_digest=sidecar.describe("bible").model_digest,
        )
        calls = (
            (sidecar.routing.Route, _route(sidecar, "bible", 1)),
            (sidecar.admin.Export, admin_pb.ExportRequest(memory="bible", layer=1)),
            (sidecar.admin.Upsert, iter([upsert])),
        )
        for call, request in calls:
            error = refusal(call, request)
            assert (error.code, error.reason) == (StatusCode.DATA_LOSS, "ERROR_REASON_CORRUPT")
            assert "bible/layer-001" in error.message
            assert words in error.message
            assert "router-admin snapshot restore" in error.message
        found = _admin(sidecar.target, "doctor", code=1)["findings"]
        [damaged] = [finding for finding in found if finding["severity"] == "error"]
        assert words in damaged["what"]
        assert damaged["remedy"] == "router-admin snapshot restore bible SNAPSHOT --replace"
        _admin(sidecar.target, "snapshot", "create", "bible", code=1)

        _admin(sidecar.target, "snapshot", "restore", "bible", "monday", "--replace", "--yes")
        answer = sidecar.route(_route(sidecar, "bible", 1))
        assert answer.router_logits.data == killed.answers["bible", 1]
    with running_sidecar(data, flags=FLAGS) as sidecar:
        assert sum(len(tensors.to_array(page.ids)) for page in exported(sidecar, "bible", 1)) == 620


def test_the_damage_stays_until_it_is_mended(data: Path) -> None:
    _flip(_file_of(data, "vector_storage/vectors/chunk_0.mmap"), 1000)
    for _ in range(2):  # the first is stopped cleanly
        with running_sidecar(data, flags=FLAGS) as sidecar:
            error = refusal(sidecar.routing.Route, _route(sidecar, "bible", 1))
            assert error.code is StatusCode.DATA_LOSS
    for name in ("writes.log", "sums.json"):  # as decision 8 says
        [path] = (data / "memories" / "bible" / "layer-001").glob(f"gen-*/{name}")
        path.unlink()
    with running_sidecar(data, flags=FLAGS) as sidecar:
        sidecar.route(_route(sidecar, "bible", 1))


def test_the_doctor_compares_everything_when_asked_to(data: Path) -> None:
    with running_sidecar(data, flags=FLAGS) as sidecar:
        found = _admin(sidecar.target, "doctor", "--deep")["findings"]
        assert "1240 entries compared: they are what was written" in {
            each["what"] for each in found
        }
        _flip(_file_of(data, "vector_storage/vectors/chunk_0.mmap"), 1000)
        found = _admin(sidecar.target, "doctor", "--deep", code=1)["findings"]
        [damaged] = [finding for finding in found if finding["severity"] == "error"]
        assert damaged["what"].startswith("layer 1: ")
        assert (
            refusal(sidecar.routing.Route, _route(sidecar, "bible", 1)).code is StatusCode.DATA_LOSS
        )
    _admin("unix:/nowhere", "doctor", "--data", data)  # which looks at no content


@pytest.mark.parametrize("name", ["vector_storage/vectors/chunk_0.mmap", "id_tracker.versions"])
def test_the_doctor_compares_the_files_of_a_closed_directory(data: Path, name: str) -> None:
    with running_sidecar(data, flags=FLAGS) as sidecar:
        for layer in (0, 1):
            sidecar.route(_route(sidecar, "bible", layer))
    found = _admin("unix:/nowhere", "doctor", "--data", data, "--deep")["findings"]
    assert {finding["severity"] for finding in found} == {"ok"}
    [path] = (path for path in [_file_of(data, name)])
    _flip(path, 100)
    _admin("unix:/nowhere", "doctor", "--data", data)
    found = _admin("unix:/nowhere", "doctor", "--data", data, "--deep", code=1)["findings"]
    [damaged] = [finding for finding in found if finding["severity"] == "error"]
    assert f"{Path(name).name} has other content than was written" in damaged["what"]
