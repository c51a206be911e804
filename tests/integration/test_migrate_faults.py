"""`router-admin migrate` killed, interrupted, and given what it cannot use: nothing is lost, and it says what to do."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from knnmoe import channels, tensors
from knnmoe.v1 import retention_pb2, retention_pb2_grpc

from tests.integration.admin_runs import Admin, admin_of, content_of
from tests.message_gate import MessageGate
from tests.sidecar import (
    ASSIGNMENT,
    CALL_TIMEOUT_S,
    COSINE,
    LOGIT_DELTA,
    Sidecar,
    random_entries,
    running_sidecar,
)

SCRIPT = Path(sys.executable).with_name("router-admin")
ENTRIES = 3000
LAYERS = 3


@pytest.fixture(scope="module")
def source(edge_sidecar: Sidecar) -> tuple[Sidecar, str]:
    """A service, and a memory that takes a while to copy."""
    edge_sidecar.create("long", gamma=[0.1])
    for layer in range(LAYERS):
        edge_sidecar.upsert("long", layer, random_entries(LOGIT_DELTA, ENTRIES, seed=layer))
    return edge_sidecar, "long"


def begin(target: str, name: str, to: Path) -> subprocess.Popen[str]:
    """`migrate` into a directory, in a process of its own."""
    words = [SCRIPT, "--json", "--target", target, "migrate", name, "--delete"]
    words += ["--from", "embedded", "--to", str(to)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def before_layer(sidecar: Sidecar, layer: int) -> MessageGate:
    """In front of the service: layers before this one are read, and this one is not."""
    return MessageGate(sidecar.target, "Export", passes=layer)


@contextmanager
def changing(sidecar: Sidecar, name: str) -> Iterator[list[int]]:
    """Meanwhile somebody writes and deletes entries; yields what grows by one with each change."""
    done: list[int] = []
    stopped, failures = threading.Event(), []

    def change() -> None:
        number = 0
        with channels.open_channel(sidecar.target) as channel:
            retention = retention_pb2_grpc.RetentionServiceStub(channel)
            while not stopped.is_set():
                number += 1
                layer, first = number % LAYERS, number * 97 % ENTRIES
                fresh = random_entries(LOGIT_DELTA, 5, seed=number, first_id=first + ENTRIES // 2)
                sidecar.upsert(name, layer, fresh)
                ids = tensors.to_array(random_entries(LOGIT_DELTA, 3, first_id=first + 1).ids)
                request = retention_pb2.DeleteRequest(
                    memory=name, layer=layer, ids=tensors.to_tensor(np.sort(ids))
                )
                retention.Delete(request, timeout=CALL_TIMEOUT_S)
                done.append(number)

    def run() -> None:
        try:
            change()
        except Exception as error:  # noqa: BLE001  # told below
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield done
    finally:
        stopped.set()
        thread.join()
    assert not failures


def test_killed_half_way_and_run_again_while_the_source_changes(
    source: tuple[Sidecar, str], data: Path
) -> None:
    sidecar, name = source
    admin, words = admin_of(sidecar.target), ("migrate", name, "--from", "embedded", "--to", data)
    with changing(sidecar, name) as changes:
        with before_layer(sidecar, 2) as gate, begin(gate.target, name, data) as process:
            gate.wait_until_stopped(process)
            process.kill()
        assert process.returncode == -signal.SIGKILL
        left = [layer["added"] for layer in admin(*words, "--dry-run")["memories"][0]["layers"]]
        assert left[0] < ENTRIES / 2 < left[2]
        again, before = begin(sidecar.target, name, data), len(changes)
        while len(changes) < before + 20 and again.poll() is None:
            time.sleep(0.01)
    stdout, stderr = again.communicate(timeout=CALL_TIMEOUT_S)
    done = json.loads(stdout)
    assert done["verified"], stderr
    for layer in done["memories"][0]["layers"]:
        assert layer["source"] == layer["target"]
        assert layer["source"]["entries"] > ENTRIES // 2
    with running_sidecar(data) as there:
        assert content_of(there, name) == content_of(sidecar, name)


def test_interrupted(source: tuple[Sidecar, str], data: Path) -> None:
    sidecar, name = source
    with before_layer(sidecar, 1) as gate, begin(gate.target, name, data) as process:
        gate.wait_until_stopped(process)
        process.send_signal(signal.SIGINT)
        gate.open()  # the command ends where it is sound: between two pages
        stdout, stderr = process.communicate(timeout=CALL_TIMEOUT_S)
    assert process.returncode == 130
    assert stdout == ""
    assert stderr.splitlines() == [
        "router-admin: interrupted; what was written stays, and running the same command again goes on"
    ]
    words = ("migrate", name, "--from", "embedded", "--to", data)
    would = admin_of(sidecar.target)(*words, "--dry-run")["memories"][0]
    assert 0 < would["added"] < sum(layer.entries for layer in sidecar.describe(name).layers)


@pytest.fixture
def service(ram_sidecar: Sidecar, name: str) -> Sidecar:
    """A service with a memory of 5 entries, and others that cannot take them."""
    ram_sidecar.create(name)
    ram_sidecar.upsert(name, 0, random_entries(LOGIT_DELTA, 5))
    ram_sidecar.create(f"{name}-model", model={"num_experts": 9})
    ram_sidecar.create(f"{name}-kind", kind=ASSIGNMENT)
    ram_sidecar.create(f"{name}-cosine", similarity=COSINE)
    ram_sidecar.create(f"{name}-preset", preset="paper", kind=LOGIT_DELTA)
    return ram_sidecar


@pytest.fixture
def admin(service: Sidecar) -> Admin:
    """Runs `router-admin --json`."""
    return admin_of(service.target)


def test_targets_that_are_of_something_else(
    service: Sidecar, admin: Admin, name: str, data: Path
) -> None:
    """Nothing is written, whichever of several memories it is."""
    admin("migrate", name, "--from", "embedded", "--to", data)

    def back(other: str) -> Any:
        words = ("migrate", name, "--from", data, "--to", "embedded", "--as", f"{name}-{other}")
        refused = admin(*words, code=2)
        assert f"memory {name} in {data}" in refused
        assert f"memory {name}-{other} in embedded" in refused
        assert admin("count", f"{name}-{other}")["total"] == 0
        return refused

    assert "num_experts: memory" in back("model")
    assert "kind: memory" in back("kind")
    assert "similarity: memory" in back("cosine")
    assert "preset" in back("preset")


def test_names_and_endpoints_that_cannot_be(admin: Admin, name: str, data: Path) -> None:
    def refused(*words: object, code: int) -> Any:
        return admin("migrate", *words, code=code)

    to_data = ("--from", "embedded", "--to", data)
    found = refused(name, "nope", *to_data, code=1)
    assert "memory 'nope' not found in 'embedded', which has: " in found
    assert not data.exists()
    assert "the same endpoint" in refused("--from", data, "--to", f"{data}/../{data.name}", code=2)
    assert "the same endpoint" in refused("--from", "embedded", "--to", "embedded", code=2)
    assert "no data directory" in refused("--from", data, "--to", "embedded", code=2)
    assert "expected embedded" in refused("--from", "embedded", "--to", "qdrant:6334", code=2)
    assert "http://HOST[:PORT]" in refused("--from", "embedded", "--to", "http://x:y", code=2)
    assert "--as names one memory" in refused(*to_data, "--as", "x", code=2)
    assert "--as names one memory" in refused("a", "b", *to_data, "--as", "x", code=2)
    assert "got '../x'" in refused(name, *to_data, "--as", "../x", code=2)
    assert "--qdrant-prefix" in refused(name, *to_data, "--qdrant-prefix", "a b", code=2)
    (data.parent / "file").touch()
    to_file = ("--from", "embedded", "--to", data.parent / "file")
    assert "is a file" in refused(name, *to_file, code=2)


def test_an_unreachable_server(admin: Admin, name: str) -> None:
    nobody = "http://127.0.0.1:1"
    assert nobody in admin("migrate", name, "--from", "embedded", "--to", nobody, code=3)
    assert nobody in admin("migrate", name, "--from", nobody, "--to", "embedded", code=3)


def test_a_directory_that_a_service_holds(admin: Admin, name: str, data: Path) -> None:
    with running_sidecar(data) as holder:
        holder.create(name)
        in_use = f"in use by process {holder.process.pid}"
        assert in_use in admin("migrate", name, "--from", "embedded", "--to", data, code=1)
        assert in_use in admin("migrate", name, "--from", data, "--to", "embedded", code=1)
        assert holder.describe(name).layers[0].entries == 0


def test_a_memory_that_cannot_be_opened(admin: Admin, name: str, data: Path) -> None:
    """All of a directory is not silently less than all; the others can be named."""
    admin("migrate", name, f"{name}-kind", "--from", "embedded", "--to", data)
    (data / "memories" / f"{name}-kind" / "memory.json").write_text("{")
    to = ("--from", data, "--to", "embedded")
    refused = admin("migrate", *to, code=1)
    assert f"'{name}-kind' cannot be opened" in refused
    assert admin("migrate", name, *to)["verified"]
