"""Names, settings and jobs that make no sense get a clear error and change nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from grpc import StatusCode
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from knnmoe.v1 import types_pb2 as types_pb

from tests.integration.refusals import (
    INVALID,
    PRECONDITION,
    Case,
    Memories,
    assert_refused,
)
from tests.sidecar import (
    ASSIGNMENT,
    COSINE,
    EXPERTS,
    HIDDEN,
    floats,
    make_fingerprint,
    refusal,
)

NAMES = ["", "a/b", "..", ".hidden", "a\0b", "x" * 300, "ümlaut", "a b", "x.deleted", "-a", "a\n"]
# Files and directories of the service's own.
NAMES += ["LOCK", "Lock", "CURRENT", "current", "gen-000001", "GEN-x", "x.Deleted"]


@pytest.mark.parametrize("bad", NAMES)
def test_create_with_a_bad_name(memories: Memories, bad: str) -> None:
    request = admin_pb.CreateMemoryRequest(name=bad, fingerprint=make_fingerprint())
    error = refusal(memories.sidecar.admin.CreateMemory, request)
    words = ("name", ascii(bad)[:50], "1 to 64 letters")
    assert_refused(error, Case(print, INVALID, "INVALID_FIELD", words))


@pytest.mark.parametrize("bad", NAMES)
def test_a_bad_name_is_a_memory_that_is_not_there(memories: Memories, bad: str) -> None:
    request = admin_pb.DeleteMemoryRequest(memory=bad)
    error = refusal(memories.sidecar.admin.DeleteMemory, request)
    assert error.reason == "ERROR_REASON_MEMORY_NOT_FOUND"
    assert len(error.message) < 500


def _settings(**fields: Any) -> types_pb.MemorySettings:
    return types_pb.MemorySettings(**fields)


SETTINGS = {
    "gamma 0": (_settings(gamma=[0.0]), ("settings.gamma[0]", "0.0", "above 0")),
    "gamma -1": (_settings(gamma=[1, -1, 1]), ("settings.gamma[1]", "-1.0", "above 0")),
    "gamma NaN": (_settings(gamma=[np.nan]), ("settings.gamma", "nan", "finite")),
    "gamma Inf": (_settings(gamma=[np.inf]), ("settings.gamma", "inf", "finite")),
    "gamma 1e300": (_settings(gamma=[1e300]), ("settings.gamma[0]", "1e+300", "at most 1e+30")),
    "2 gammas for 3 layers": (_settings(gamma=[1, 1]), ("settings.gamma", "[1.0, 1.0]", "1 number, or 3")),
    "4 step sizes": (_settings(step_size=[1] * 4), ("settings.step_size", "1 number, or 3")),
    "step size 1e9": (_settings(step_size=[1e9]), ("settings.step_size[0]", "1000000000.0", "at most 1e+06")),
    "K 0": (_settings(neighbours=0), ("settings.neighbours", "got 0", "1 to 1024")),
    "K 2^31": (_settings(neighbours=2**31), ("settings.neighbours", "2147483648", "1 to 1024")),
    "s0 -1": (_settings(null_weight=-1), ("settings.null_weight", "-1.0", "0 or more")),
    "s0 1e300": (_settings(null_weight=1e300), ("settings.null_weight", "1e+300", "at most 1e+30")),
    "s0 NaN": (_settings(null_weight=np.nan), ("settings.null_weight", "nan", "0 or more")),
    "min_lambda 1": (_settings(min_lambda=1), ("settings.min_lambda", "1.0", "[0, 1)")),
    "layer 3": (_settings(layers=[0, 3]), ("settings.layers", "3", "0 to 2")),
    "ef 0": (_settings(hnsw_ef=0), ("settings.hnsw_ef", "got 0", "1 to 65536")),
    "oversampling 0.5": (_settings(oversampling=0.5), ("settings.oversampling", "0.5", "1 to 100")),
    "support 0": (_settings(support=0), ("settings.support", "got 0", "union, top_k")),
    "support 9": (_settings(support=9), ("settings.support", "got 9", "union, top_k")),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "words"), SETTINGS.values(), ids=list(SETTINGS))
def test_settings(
    memories: Memories, settings: types_pb.MemorySettings, words: tuple[str, ...]
) -> None:
    case = Case(print, INVALID, "INVALID_FIELD", words)
    admin = memories.sidecar.admin
    update = admin_pb.UpdateSettingsRequest(memory="deltas", settings=settings)
    assert_refused(refusal(admin.UpdateSettings, update), case)
    create = admin_pb.CreateMemoryRequest(
        name="new", fingerprint=make_fingerprint(), settings=settings
    )
    assert_refused(refusal(admin.CreateMemory, create), case)


@pytest.mark.parametrize(
    "settings",
    [_settings(kind=ASSIGNMENT), _settings(similarity=COSINE), _settings(preset="paper")],
    ids=["kind", "similarity", "preset"],
)
def test_settings_that_are_fixed(memories: Memories, settings: types_pb.MemorySettings) -> None:
    update = admin_pb.UpdateSettingsRequest(memory="deltas", settings=settings)
    error = refusal(memories.sidecar.admin.UpdateSettings, update)
    assert_refused(error, Case(print, INVALID, "INVALID_FIELD", ("fixed at creation",)))


def test_unknown_preset(memories: Memories) -> None:
    request = admin_pb.CreateMemoryRequest(
        name="new", fingerprint=make_fingerprint(), settings=_settings(preset="best")
    )
    error = refusal(memories.sidecar.admin.CreateMemory, request)
    words = ("settings.preset", "'best'", "boosted, paper, paper-v2, recommended")
    assert_refused(error, Case(print, INVALID, "INVALID_FIELD", words))


FINGERPRINTS = {
    "num_layers": 0,
    "hidden_size": 0,
    "num_experts": 2**31,
    "top_k": EXPERTS + 1,
    "architecture": "",
    "router_hash": "x" * 300,
}


@pytest.mark.parametrize(("field", "value"), FINGERPRINTS.items())
def test_fingerprint_of_no_model(memories: Memories, field: str, value: Any) -> None:
    request = admin_pb.CreateMemoryRequest(
        name="new", fingerprint=make_fingerprint(**{field: value})
    )
    error = refusal(memories.sidecar.admin.CreateMemory, request)
    words = (f"fingerprint.{field}", ascii(value)[:50])
    assert_refused(error, Case(print, INVALID, "INVALID_FIELD", words))


def test_create_twice(memories: Memories) -> None:
    request = admin_pb.CreateMemoryRequest(name="deltas", fingerprint=make_fingerprint())
    error = refusal(memories.sidecar.admin.CreateMemory, request)
    assert_refused(error, Case(print, StatusCode.ALREADY_EXISTS, "MEMORY_EXISTS", ("'deltas'",)))


CALIBRATIONS = {
    "lambda0 0": ({"lambda0": 0.0}, ("lambda0", "0.0", "between 0 and 1")),
    "lambda0 1": ({"lambda0": 1.0}, ("lambda0", "1.0", "between 0 and 1")),
    "lambda0 NaN": ({"lambda0": np.nan}, ("lambda0", "nan", "between 0 and 1")),
    "quantile 2": ({"lambda0": 0.5, "quantile": 2.0}, ("quantile", "2.0", "between 0 and 1")),
    "sample 2^31": ({"lambda0": 0.5, "sample": 2**31}, ("sample", "2147483648", "0 to 100000")),
    "NaN input": (
        {"lambda0": 0.5, "inputs": [admin_pb.LayerInputs(router_inputs=floats(np.full((2, HIDDEN), np.nan)))]},
        ("inputs.router_inputs[0][0]", "nan"),
    ),
    "empty layer": (
        {"lambda0": 0.5, "inputs": [admin_pb.LayerInputs(layer=1, router_inputs=floats(np.zeros((2, HIDDEN))))]},
        ("no neighbours in layer 1", "upsert first"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "words"), CALIBRATIONS.values(), ids=list(CALIBRATIONS))
def test_calibrate(memories: Memories, fields: dict[str, Any], words: tuple[str, ...]) -> None:
    request = admin_pb.CalibrateRequest(memory="deltas", **fields)
    error = refusal(memories.sidecar.admin.Calibrate, request)
    assert error.code is INVALID
    assert all(word in error.message for word in words), error


def test_other_admin_requests(memories: Memories) -> None:
    admin = memories.sidecar.admin
    optimize = admin_pb.OptimizeRequest(memory="deltas", quantization="int3")
    words = ("quantization", "'int3'", "none, float16, int8")
    assert_refused(refusal(admin.Optimize, optimize), Case(print, INVALID, "INVALID_FIELD", words))
    too_much = admin_pb.OptimizeRequest(memory="deltas", recall=1.5)
    words = ("recall", "got 1.5", "a share from 0")
    assert_refused(refusal(admin.Optimize, too_much), Case(print, INVALID, "INVALID_FIELD", words))
    layer = Case(print, PRECONDITION, "LAYER_NOT_FOUND", ("layer", "got 9", "0 to 2"))
    assert_refused(
        refusal(admin.Optimize, admin_pb.OptimizeRequest(memory="deltas", layers=[9])), layer
    )
    assert_refused(refusal(admin.Count, admin_pb.CountRequest(memory="deltas", layer=9)), layer)
    assert_refused(refusal(admin.Export, admin_pb.ExportRequest(memory="deltas", layer=9)), layer)
    missing = Case(print, StatusCode.NOT_FOUND, "MEMORY_NOT_FOUND", ("'nope'",))
    assert_refused(refusal(admin.Stats, admin_pb.StatsRequest(memory="nope")), missing)
