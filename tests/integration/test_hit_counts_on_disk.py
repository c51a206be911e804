"""Hit counts outlive the service; after SIGKILL at most the last flush interval is missing."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from knnmoe import tensors
from knnmoe.v1 import memory_admin_pb2 as admin_pb

from tests.sidecar import (
    CALL_TIMEOUT_S,
    EXPERTS,
    LOGIT_DELTA,
    Sidecar,
    exported,
    random_entries,
    random_keys,
    route_request,
    running_sidecar,
)

ONE_LAYER = {"num_layers": 1}
HITS = Path("memories", "m", "hits-000.npz")
OFTEN, NEVER = ("--flush-interval-s", "0.1"), ("--flush-interval-s", "3600")


def _fill(sidecar: Sidecar) -> None:
    sidecar.create("m", model=ONE_LAYER, gamma=[50.0])
    sidecar.upsert("m", 0, random_entries(LOGIT_DELTA, 30))


def _route(sidecar: Sidecar, times: int) -> None:
    """Tokens that lie on the first three keys, and near no other."""
    [entries] = exported(sidecar, "m", 0)
    inputs = tensors.to_array(entries.keys)[:3]
    own = random_keys(np.random.default_rng(0), 3, EXPERTS)
    digest = sidecar.describe("m").model_digest
    for _ in range(times):
        sidecar.route(route_request("m", digest, inputs, own))


def _hits(sidecar: Sidecar) -> tuple[int, int]:
    """Of the layer: all hits, and entries that were never hit."""
    request = admin_pb.StatsRequest(memory="m")
    [layer] = sidecar.admin.Stats(request, timeout=CALL_TIMEOUT_S).memories[0].layers
    return layer.hits, layer.entries_never_hit


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + CALL_TIMEOUT_S
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_clean_stop_loses_nothing(data: Path) -> None:
    with running_sidecar(data, flags=NEVER) as sidecar:
        _fill(sidecar)
        _route(sidecar, 4)
        assert _hits(sidecar) == (12, 27)
    with running_sidecar(data, flags=NEVER) as sidecar:
        assert _hits(sidecar) == (12, 27)
        _route(sidecar, 1)
        assert _hits(sidecar) == (15, 27)


def test_sigkill_loses_at_most_what_was_not_flushed(data: Path) -> None:
    with Sidecar(data, flags=OFTEN) as sidecar:
        _fill(sidecar)
        _route(sidecar, 2)
        _wait_for(data / HITS)
        sidecar.kill()
    with Sidecar(data, flags=NEVER) as sidecar:
        hits, _ = _hits(sidecar)
        assert 0 < hits <= 6
        assert hits % 3 == 0
        _route(sidecar, 5)
        sidecar.kill()
    with running_sidecar(data) as sidecar:
        assert _hits(sidecar)[0] == hits


def test_a_damaged_file_does_not_stop_the_start(data: Path) -> None:
    with running_sidecar(data) as sidecar:
        _fill(sidecar)
        _route(sidecar, 1)
    (data / HITS).write_bytes((data / HITS).read_bytes()[:100])
    with running_sidecar(data) as sidecar:
        assert _hits(sidecar) == (0, 30)
        assert "hits-000.npz cannot be read" in sidecar.stderr
        _route(sidecar, 1)
    with running_sidecar(data) as sidecar:
        assert _hits(sidecar) == (3, 27)
        sidecar.admin.DeleteMemory(admin_pb.DeleteMemoryRequest(memory="m"), timeout=CALL_TIMEOUT_S)
    assert not (data / "memories" / "m").exists()
