"""A sidecar of the runner's own: it serves within the block and is gone after it."""

from __future__ import annotations

from pathlib import Path

import pytest
from knnmoe.client import AdminClient, ServiceUnavailable

from model_runner.sidecar import running_sidecar


def test_serves_within_the_block_only(tmp_path: Path) -> None:
    with running_sidecar(tmp_path / "data", tmp_path / "log") as target:
        with AdminClient(target) as client:
            assert client.find("law") is None
        with (
            pytest.raises(ServiceUnavailable, match=r"(?s)did not start.*is in use by process"),
            running_sidecar(tmp_path / "data", tmp_path / "log 2"),
        ):
            raise AssertionError("two services on one directory")
    with AdminClient(target) as client, pytest.raises(ServiceUnavailable, match=target):
        client.find("law")
    assert "stopped" in (tmp_path / "log").read_text()


def test_an_error_in_the_block_ends_it_too(tmp_path: Path) -> None:
    listen = f"unix:{tmp_path}/s"

    def serve_and_fail() -> None:
        with running_sidecar(tmp_path / "data", tmp_path / "log", listen) as target:
            raise LookupError(target)

    with pytest.raises(LookupError, match=listen):
        serve_and_fail()
    assert "stopped" in (tmp_path / "log").read_text()


def test_one_that_does_not_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(ServiceUnavailable, match="--listen"),
        running_sidecar(tmp_path / "data", tmp_path / "log", "nonsense"),
    ):
        raise AssertionError("nothing listens")
