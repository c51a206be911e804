"""`router-admin quantize` on a real service: methods, reductions, measuring, bad values, restarts, kills."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from knnmoe.v1 import operations_pb2 as operations_pb
from knnmoe.v1 import operations_pb2_grpc, quantization_pb2_grpc
from knnmoe.v1 import quantization_pb2 as pb
from typer.testing import CliRunner

from router_service.cli.admin import app
from tests.integration.admin_runs import admin_of
from tests.integration.server_snapshots import until
from tests.sidecar import (
    EXPERTS,
    LOGIT_DELTA,
    Sidecar,
    exported,
    floats,
    random_entries,
    random_keys,
    refusal,
    route_request,
    running_sidecar,
)

ENTRIES = 700
RUNNING = operations_pb.OPERATION_STATE_RUNNING


def _filled(sidecar: Sidecar, name: str = "m") -> None:
    sidecar.create(name, kind=LOGIT_DELTA, gamma=[0.05])
    sidecar.upsert(name, 0, random_entries(LOGIT_DELTA, ENTRIES))


def _answer(sidecar: Sidecar, name: str = "m") -> bytes:
    rng = np.random.default_rng(1)
    digest = sidecar.describe(name).model_digest
    inputs, own = random_keys(rng, 20), random_keys(rng, 20, EXPERTS)
    reply = sidecar.route(
        route_request(name, digest, inputs, own, neighbours=3, with_neighbours=True)
    )
    reply.ClearField("times")
    reply.ClearField("memory_version")
    return reply.SerializeToString(deterministic=True)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with running_sidecar(tmp_path_factory.mktemp("data")) as sidecar:
        _filled(sidecar)
        yield sidecar


def test_a_memory_is_quantized_and_back(service: Sidecar) -> None:
    admin, before = admin_of(service.target), _answer(service)
    for flags, label, oversampling in (
        (["--method", "turbo4"], "turbo4", 2.0),
        (["--method", "float16", "--search-dimension", 12], "pca12+float16", 4.0),
        (["--search-dimension", 14, "--projection", "random", "--oversampling", 9], "random14", 9.0),
        (["--method", "none"], "none", 2.0),
    ):  # fmt: skip
        document = admin("quantize", "m", "--layer", 0, *flags)
        assert document["oversampling"] == oversampling
        assert [row["quantization"] for row in document["layers"]] == [label]
        assert service.describe("m").layers[0].quantization == label
    assert _answer(service) == before


def test_optimize_keeps_the_compression(service: Sidecar) -> None:
    admin = admin_of(service.target)
    admin("quantize", "m", "--method", "int8", "--layer", 0)
    assert admin("optimize", "m", "--layer", 0)["layers"][0]["quantization"] == "int8"
    admin("optimize", "m", "--layer", 0, "--quantization", "none")
    assert service.describe("m").layers[0].quantization == "none"


def _outlier_keys(rows: int, dimension: int) -> np.ndarray:
    """Keys around centres with one coordinate a hundred times the others."""
    rng = np.random.default_rng(4)
    centres = rng.standard_normal((100, dimension))
    keys = centres[rng.integers(100, size=rows)] + rng.standard_normal((rows, dimension)) / 2
    keys[:, 3] *= 100
    return keys.astype(np.float32)


def test_a_method_that_the_keys_do_not_bear_is_said(service: Sidecar) -> None:
    """One coordinate a hundred times the others takes int8's resolution from them; float16 bears it."""
    service.create("outlier", kind=LOGIT_DELTA, model={"num_layers": 1, "hidden_size": 64})
    keys = _outlier_keys(3000, 64)
    for start in range(0, len(keys), 500):
        some = random_entries(LOGIT_DELTA, 500, first_id=1 + start)
        some.keys.CopyFrom(floats(keys[start : start + 500]))
        service.upsert("outlier", 0, some)

    def admin(*words: str) -> tuple[Any, str]:
        done = CliRunner().invoke(app, ["--json", "--target", service.target, *words])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout), done.stderr

    def quantized(method: str) -> tuple[float, str]:
        document, said = admin("quantize", "outlier", "--method", method)
        return document["layers"][0]["recall"], said

    def searched(recall: str) -> tuple[dict[str, Any], str]:
        document, said = admin("optimize", "outlier", "--recall", recall)
        return document["search"]["layers"][0], said

    recall, said = quantized("int8")
    assert recall < 0.9
    assert (
        f"warning: layer 0: searches find {recall:.1%} of the 32 nearest entries with int8" in said
    )
    assert "router-admin quantize outlier --method float16" in said
    layer, said = searched("0.98")  # by more candidates
    assert not layer["exact"]
    assert layer["recall_at_k"] >= 0.98
    quantized("binary")
    layer, said = searched("1")
    assert (layer["exact"], layer["recall_at_k"]) == (True, 1.0)
    assert "warning: layers 0: no number of candidates finds 100.0%" in said
    assert "optimize outlier --recall 1 again" in said
    recall, said = quantized("float16")
    assert recall >= 0.98
    assert "warning" not in said
    layer, said = searched("0.98")
    assert not layer["exact"]
    assert min(layer["recall_at_1"], layer["recall_at_k"]) >= 0.98
    assert layer["ms_per_lookup"] > 0
    assert "no number of candidates" not in said
    settings = service.describe("outlier").settings
    assert (settings.search_recall, list(settings.exact_layers)) == (0.98, [])
    measured = admin_of(service.target)(
        "quantize", "outlier", "--measure", "--methods", "int8,float16", "--sample", 100
    )["measurements"]
    errors = {row["compression"]: row["lambda_error_mean"] for row in measured}
    recalls = {row["compression"]: row["recall_at_1"] for row in measured}
    assert recalls["int8"] <= recalls["float16"] == 1.0
    assert errors["float16"] <= 1e-6


def test_calibration_does_not_depend_on_the_index(service: Sidecar) -> None:
    """Half a memory is one document: searches that leave it out used to lose their way in the index."""
    service.create("book", kind=LOGIT_DELTA, model={"num_layers": 1})
    entries = random_entries(LOGIT_DELTA, 3000)
    for number, origin in enumerate(entries.provenance):
        origin.source = "s"
        origin.example = f"note-{number // 50}" if number % 20 == 0 else "book"
    service.upsert("book", 0, entries)
    admin = admin_of(service.target)
    before = admin("calibrate", "book", "--dry-run")["layers"]
    admin("optimize", "book")
    assert admin("calibrate", "book", "--dry-run")["layers"] == before


def test_measuring_says_what_each_method_costs_and_changes_nothing(
    service: Sidecar, tmp_path: Path
) -> None:
    admin, before = admin_of(service.target), service.describe("m")
    files = ["--json", tmp_path / "m.json", "--plot", tmp_path / "m.png"]
    document = admin(
        "quantize", "m", "--measure", "--methods", "none,int8,pca6", "--sample", 50, *files
    )
    none, int8, pca = document["measurements"]
    assert [row["compression"] for row in (none, int8, pca)] == ["none", "int8", "pca6"]
    assert {(row["layer"], row["entries"], row["queries"]) for row in (none, int8, pca)} == {
        (0, ENTRIES, 50)
    }
    assert none["recall_at_1"] == 1.0
    assert none["lambda_error_max"] < 1e-5
    assert none["blend_error_max"] < 1e-4
    for row in (int8, pca):
        assert 0 < row["ram_bytes_per_key"] < none["ram_bytes_per_key"] < none["disk_bytes_per_key"]
    assert all(row["ms_per_query"] > 0 < row["build_s"] for row in (none, int8, pca))
    assert json.loads((tmp_path / "m.json").read_text()) == document
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")
    assert service.describe("m") == before
    assert not list(service.data.rglob("gen-measuring"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "give either --measure, or --method"),
        (["--measure", "--method", "int8"], "give either --measure, or --method"),
        (["--method", "int3"], "int3"),
        (["--search-dimension", "16"], "got 'pca16'"),
        (["--method", "int8", "--oversampling", "0.5"], "'--oversampling'"),
        (["--measure", "--methods", "int8,pca0"], "got 'pca0'"),
        (["--measure", "--methods", "none", "--layer", "2"], "got 'layer 2 with 0 entries'"),
        (["--measure", "--inputs", "missing.safetensors"], "missing.safetensors"),
        (["--method", "int8", "--layer", "9"], "got 9"),
    ],
)
def test_bad_values_are_named(service: Sidecar, flags: list[str], words: str) -> None:
    admin, before = admin_of(service.target), service.describe("m")
    service_says = words.startswith("got")
    assert words in admin("quantize", "m", *flags, code=1 if service_says else 2)
    assert service.describe("m") == before


@pytest.mark.parametrize("oversampling", [0.5, float("nan"), 1e9])
def test_the_service_refuses_an_oversampling_out_of_range(
    service: Sidecar, oversampling: float
) -> None:
    stub = quantization_pb2_grpc.QuantizationServiceStub(service.channel)
    request = pb.QuantizeRequest(memory="m", compression="int8", oversampling=oversampling)
    error = refusal(lambda sent, timeout: list(stub.Quantize(sent, timeout=timeout)), request)
    assert "oversampling" in error.message


def test_search_keys_apart_survive_a_kill_and_writes_meanwhile(tmp_path: Path) -> None:
    with Sidecar(tmp_path) as sidecar:
        _filled(sidecar)
        later = random_entries(LOGIT_DELTA, 60, seed=5, first_id=10_000)
        writer = threading.Thread(target=sidecar.upsert, args=("m", 0, later))
        writer.start()
        admin_of(sidecar.target)("quantize", "m", "--search-dimension", 8, "--layer", 0)
        writer.join()
        before, stored = _answer(sidecar), exported(sidecar, "m", 0)
        sidecar.kill()
    with running_sidecar(tmp_path) as again:
        layer = again.describe("m").layers[0]
        assert (layer.entries, layer.quantization) == (ENTRIES + 60, "pca8")
        assert _answer(again) == before
        assert exported(again, "m", 0) == stored


def test_what_is_cancelled_leaves_the_memory_as_it_was(service: Sidecar) -> None:
    before = service.describe("m")
    stub = quantization_pb2_grpc.QuantizationServiceStub(service.channel)
    call = stub.Quantize(pb.QuantizeRequest(memory="m", compression="binary"))
    next(call)
    with service.paused():  # the operation does not end before the service hears of it
        call.cancel()
    operations = operations_pb2_grpc.OperationServiceStub(service.channel)
    listed = operations_pb.ListOperationsRequest(memory="m")
    until(lambda: operations.ListOperations(listed).operations[-1].state != RUNNING)
    after = service.describe("m")
    assert [each.quantization for each in after.layers] == ["none"] * 3
    assert after.settings == before.settings


def test_a_snapshot_has_the_search_keys(service: Sidecar) -> None:
    admin = admin_of(service.target)
    admin("quantize", "m", "--search-dimension", 8, "--layer", 0)
    made = admin("snapshot", "create", "m")
    admin("snapshot", "restore", "m", made["name"], "--as", "copy")
    assert service.describe("copy").layers[0].quantization == "pca8"
    assert _answer(service, "copy") == _answer(service)
    admin("quantize", "m", "--method", "none", "--layer", 0)
