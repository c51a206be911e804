"""The probe of containers imports no more than it needs. What it says of a service: test_service_process.py."""

from __future__ import annotations

import json
import subprocess
import sys

MODULES = "import json, sys, knnmoe.probe; print(json.dumps(sorted(sys.modules)))"
OURS = {"knnmoe", "knnmoe.channels", "knnmoe.credentials", "knnmoe.probe", "knnmoe.watched"}


def test_grpc_and_its_health_messages_are_all_it_imports() -> None:
    """With the rest it would take as long as `router-admin health`, every few seconds."""
    run = subprocess.run([sys.executable, "-c", MODULES], capture_output=True, check=True)
    found = set(json.loads(run.stdout))
    packages = {name.partition(".")[0] for name in found} - sys.stdlib_module_names
    heavy = {"numpy", "pyarrow", "pydantic", "qdrant_client", "qdrant_edge", "rich", "typer"}
    assert packages & (heavy | {"router_service", "httpx", "torch"}) == set()
    assert {name for name in found if name.startswith("knnmoe")} == OURS
