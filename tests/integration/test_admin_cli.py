"""`router-admin` against a real service: every command, its JSON, its exit codes."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from router_service.cli.admin import app
from tests.sidecar import (
    LOGIT_DELTA,
    Sidecar,
    random_entries,
    random_keys,
)

FLAGS = [
    *("--architecture", "tiny_moe", "--num-layers", "3", "--hidden-size", "16"),
    *("--num-experts", "8", "--top-k", "2", "--router-hash", "5eed" * 16),
]
Admin = Callable[..., Any]


@pytest.fixture
def service(ram_sidecar: Sidecar) -> Sidecar:
    """The service that the commands talk to."""
    return ram_sidecar


@pytest.fixture
def admin(service: Sidecar) -> Admin:
    """Runs `router-admin` on the service; `code` is the expected exit code."""

    def run(*arguments: str, code: int = 0, target: str = service.target) -> Any:
        result = CliRunner().invoke(app, ["--target", target, *arguments])
        assert result.exit_code == code, result.output
        assert "Traceback" not in result.output
        return result

    return run


@pytest.fixture
def memory(service: Sidecar, name: str) -> str:
    """A logit_delta memory with 30 entries in layer 0 and 20 in layer 2."""
    service.create(name, kind=LOGIT_DELTA, gamma=[0.05])
    service.upsert(name, 0, random_entries(LOGIT_DELTA, 30))
    service.upsert(name, 2, random_entries(LOGIT_DELTA, 20, seed=2, first_id=100))
    return name


def document(result: Any) -> Any:
    """The JSON document that is all of stdout."""
    return json.loads(result.stdout)


def test_create_with_flags_and_show(admin: Admin, name: str) -> None:
    settings = [
        "--preset",
        "paper",
        "--neighbours",
        "3",
        "--gamma",
        "0.1",
        "--gamma",
        "0.2",
        "--gamma",
        "0.3",
    ]
    settings += [
        "--layers",
        "0,1-2",
        "--support",
        "top_k",
        "--min-lambda",
        "0.25",
        "--similarity",
        "rbf",
    ]
    made = document(admin("--json", "memory", "create", name, *FLAGS, *settings))
    shown = document(admin("--json", "memory", "show", name))
    assert made == shown
    assert shown["fingerprint"]["router_hash"] == "5eed" * 16
    stored = shown["settings"]
    assert stored["kind"] == "assignment"
    assert stored["preset"] == "paper"
    assert stored["gamma"] == [0.1, 0.2, 0.3]
    assert stored["layers"] == [0, 1, 2]
    assert stored["support"] == "top_k"
    assert [layer["entries"] for layer in shown["layers"]] == [0, 0, 0]
    table = admin("memory", "show", name).stdout
    assert re.search(r"^ *layers +0, 1, 2 *$", table, re.M)
    assert re.search(r"^\s*exact_layers +none *$", table, re.M)
    assert name in table
    assert "assignment" in table


def test_create_from_the_fingerprint_of_another_memory(
    admin: Admin, memory: str, name: str, tmp_path: Path
) -> None:
    file = tmp_path / "model.json"
    file.write_text(admin("--json", "memory", "show", memory).stdout)
    made = document(admin("--json", "memory", "create", f"{name}-b", "--fingerprint", str(file)))
    assert (
        made["model_digest"] == document(admin("--json", "memory", "show", memory))["model_digest"]
    )
    admin("memory", "create", f"{name}-c", "--fingerprint", str(file), *FLAGS, code=2)
    file.write_text('{"architecture": "x", "num_layers": 1}')
    refused = admin("memory", "create", f"{name}-d", "--fingerprint", str(file), code=2)
    assert f"{file}: field hidden_size" in refused.stderr


def test_create_says_what_is_missing(admin: Admin, name: str) -> None:
    refused = admin("memory", "create", name, *FLAGS[:4], code=2)
    assert "--hidden-size, --num-experts, --top-k, --router-hash" in refused.stderr
    assert refused.stdout == ""


def test_list_and_count(admin: Admin, memory: str) -> None:
    listed = document(admin("--json", "memory", "list"))["memories"]
    assert memory in [item["name"] for item in listed]
    assert memory in admin("memory", "list").stdout
    assert document(admin("--json", "count", memory))["total"] == 50
    counted = document(admin("--json", "count", memory, "--layer", "2"))
    assert [(layer["layer"], layer["entries"]) for layer in counted["layers"]] == [(2, 20)]
    assert "50" in admin("count", memory).stdout


def test_set(admin: Admin, memory: str) -> None:
    changed = document(
        admin("--json", "memory", "set", memory, "--neighbours", "8", "--null-weight", "1")
    )
    assert changed["settings"]["neighbours"] == 8
    assert changed["settings"]["null_weight"] == 1
    assert changed["settings"]["gamma"] == [0.05]
    assert "nothing to set" in admin("memory", "set", memory, code=2).stderr
    refused = admin("memory", "set", memory, "--gamma", "-1", code=1)
    assert (
        refused.stderr == "router-admin: settings.gamma[0]: got -1.0, expected a number above 0\n"
    )
    assert "--layers: got '5-3'" in admin("memory", "set", memory, "--layers", "5-3", code=2).stderr
    assert "settings" in admin("memory", "set", memory, "--neighbours", "-1", code=2).stderr


def test_delete(admin: Admin, memory: str) -> None:
    refused = admin("memory", "delete", memory, code=2)
    assert "stdin is no terminal; pass --yes" in refused.stderr
    assert document(admin("--json", "memory", "delete", memory, "--yes")) == {
        "deleted": memory,
        "entries": 50,
    }
    gone = admin("memory", "delete", memory, "--yes", code=1)
    assert f"memory '{memory}' not found" in gone.stderr


def test_delete_asks_on_a_terminal(
    admin: Admin, service: Sidecar, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router_service.cli.output.on_terminal", lambda: True)
    arguments = ["--target", service.target, "memory", "delete", memory]
    kept = CliRunner().invoke(app, arguments, input="n\n")
    assert kept.exit_code == 1
    assert f"Delete memory {memory} with 50 entries?" in kept.stderr
    assert document(admin("--json", "count", memory))["total"] == 50
    assert CliRunner().invoke(app, arguments, input="y\n").exit_code == 0
    admin("count", memory, code=1)


def test_calibrate(admin: Admin, memory: str, tmp_path: Path) -> None:
    dry = document(admin("--json", "calibrate", memory, "--lambda0", "0.5", "--dry-run"))
    assert [layer["layer"] for layer in dry["layers"]] == [0, 2]
    assert document(admin("--json", "memory", "show", memory))["settings"]["gamma"] == [0.05]
    stored = document(admin("--json", "calibrate", memory, "--lambda0", "0.5"))
    for layer in stored["layers"]:
        assert layer["gamma"] == pytest.approx(np.log(2) / layer["squared_distance"])
    gamma = document(admin("--json", "memory", "show", memory))["settings"]["gamma"]
    assert gamma == [stored["layers"][0]["gamma"], 0.05, stored["layers"][1]["gamma"]]

    inputs = random_keys(np.random.default_rng(0), 9)
    save_file({"layers.0.router_inputs": inputs}, tmp_path / "dev.safetensors")
    arguments = ["--json", "calibrate", memory, "--inputs", str(tmp_path / "dev.safetensors")]
    measured = document(admin(*arguments, "--quantile", "0.25"))["layers"]
    assert [(layer["layer"], layer["queries"]) for layer in measured] == [(0, 9)]
    save_file({"other": inputs}, tmp_path / "dev.safetensors")
    assert "no tensor layers.N.router_inputs" in admin(*arguments, code=2).stderr
    assert "gamma of" in admin("calibrate", memory, "--dry-run").stdout


def test_optimize(admin: Admin, edge_sidecar: Sidecar, name: str) -> None:
    edge_sidecar.create(name, model={"num_layers": 1})
    edge_sidecar.upsert(name, 0, random_entries(LOGIT_DELTA, 30))
    arguments = ["optimize", name, "--quantization", "int8", "--layer", "0"]
    result = document(admin("--json", *arguments, target=edge_sidecar.target))
    [layer] = result["layers"]
    assert (layer["layer"], layer["entries"], layer["quantization"]) == (0, 30, "int8")
    assert layer["elapsed_s"] > 0
    edge_sidecar.create(f"{name}2", model={"num_layers": 2})
    edge_sidecar.upsert(f"{name}2", 1, random_entries(LOGIT_DELTA, 30))
    small = admin("optimize", f"{name}2", target=edge_sidecar.target)
    assert "layer 1: searched exactly: 30 entries need no index" in small.stderr
    assert "layer 0" not in small.stderr
    admin("optimize", name, "--layer", "7", code=1, target=edge_sidecar.target)


def test_stats(admin: Admin, memory: str) -> None:
    stats = document(admin("--json", "stats", memory))
    assert [item["memory"] for item in stats["memories"]] == [memory]
    assert [layer["entries"] for layer in stats["memories"][0]["layers"]] == [30, 0, 20]
    assert [layer["disk_bytes"] for layer in stats["memories"][0]["layers"]] == [0, 0, 0]  # in RAM
    assert stats["service_version"] == "0.1.0"
    assert memory in admin("stats").stdout


def test_health(admin: Admin, service: Sidecar) -> None:
    health = document(admin("--json", "health"))
    assert health["serving"] is True
    assert health["target"] == service.target
    assert set(health["services"].values()) == {"SERVING"}


def test_nobody_listens(admin: Admin, tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/s"
    refused = admin("memory", "list", code=3, target=address)
    wanted = f"nothing listens on {address}; start it with: router-service serve --data DIR --listen {address}"
    assert wanted in refused.stderr
    assert refused.stderr.startswith("router-admin: ")
    assert refused.stderr.count("\n") == 1
    assert refused.stdout == ""


def test_a_listener_that_never_answers(admin: Admin) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        refused = admin("--timeout-s", "0.2", "memory", "list", code=3, target=address)
        assert f"no answer from {address} within 0.2 s; raise --timeout-s" in refused.stderr
        refused = admin("--timeout-s", "0.2", "optimize", "m", code=3, target=address)
        assert "within 0.2 s" in refused.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["memory", "create"],
        ["--timeout-s", "0", "health"],
        ["count", "m", "--layer", "x"],
    ],
)
def test_bad_usage(admin: Admin, arguments: list[str]) -> None:
    assert admin(*arguments, code=2).stdout == ""


def test_the_console_script(service: Sidecar, memory: str) -> None:
    script = Path(sys.executable).with_name("router-admin")
    listed = subprocess.run(
        [script, "--json", "memory", "show", memory],
        capture_output=True,
        text=True,
        check=True,
        env={"ROUTER_ADMIN_TARGET": service.target, "PATH": ""},
    )
    assert json.loads(listed.stdout)["name"] == memory
    assert listed.stderr == ""
    missing = subprocess.run(
        [script, "--target", service.target, "count", "nope"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert missing.returncode == 1
    assert missing.stderr.startswith("router-admin: memory 'nope' not found; this service has: ")
