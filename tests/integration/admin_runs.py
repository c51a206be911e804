"""Runs of `router-admin` against a service, and the whole content of a memory to compare."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from knnmoe.v1 import memory_admin_pb2 as admin_pb
from typer.testing import CliRunner

from router_service.cli.admin import app
from tests.sidecar import LAYERS, Sidecar, exported

Admin = Callable[..., Any]


def admin_of(target: str) -> Admin:
    """Runs `router-admin --json` on a service; returns the document, or stderr when it is expected to fail."""

    def run(*arguments: object, code: int = 0) -> Any:
        words = ["--json", "--target", target, *map(str, arguments)]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == code, result.output
        assert "Traceback" not in result.output
        return json.loads(result.stdout) if code == 0 else result.stderr

    return run


def content_of(sidecar: Sidecar, name: str) -> list[list[admin_pb.Entries]]:
    """Every entry of every layer, in the order of ids, bit for bit."""
    return [exported(sidecar, name, layer) for layer in range(LAYERS)]
