"""`router-service serve --config`: what comes first, what is refused and how; and what systemd is told."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from router_service.cli.given_settings import Given, options
from router_service.cli.serve import app
from router_service.settings import QdrantSettings, ServiceSettings
from tests.sidecar import Sidecar


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "service.toml"


def _refused(file: Path, *flags: str) -> str:
    done: Any = CliRunner().invoke(app, ["serve", "--config", str(file), *flags])
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.stderr
    return str(done.stderr)


def test_every_option_of_serve_may_be_in_the_file() -> None:
    from docs.generate_cli import commands, options_of

    serve = dict(commands())["router-service serve"]
    flags = {option.opts[0].removeprefix("--") for option in options_of(serve)}
    assert set(options()) == flags - {"config"}


def test_command_line_then_environment_then_file_then_default(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text(
        'data = "/from/file"\nmax-in-flight = 3\nworkers = 3\nqdrant-prefix = "file"\n'
        "qdrant-connections = 3\ninsecure = true\n"
    )
    monkeypatch.setenv("ROUTER_SERVICE_MAX_IN_FLIGHT", "2")
    monkeypatch.setenv("router_service_workers", "2")
    monkeypatch.setenv("ROUTER_SERVICE_QDRANT_PREFIX", "env")
    got = Given.read({"max_in_flight": 1, "qdrant_connections": 1}, file).settings()
    assert (got.max_in_flight, got.workers, got.insecure) == (1, 2, True)
    assert got.data == Path("/from/file")
    assert (got.qdrant.prefix, got.qdrant.connections) == ("env", 1)
    assert got.drain_s == ServiceSettings.model_fields["drain_s"].default
    assert got.qdrant.timeout_s == QdrantSettings.model_fields["timeout_s"].default


def test_a_service_with_a_file(data: Path, file: Path) -> None:
    file.write_text('log-level = "ERROR"\nbackend = "exact"\nlisten = "no address"\n')
    with Sidecar(data, backend="exact", flags=["--config", str(file)]) as sidecar:
        sidecar.stop()
        assert sidecar.stderr == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "max-in-flight = 0",
            "max-in-flight = 0: Input should be greater than or equal to 1; change",
        ),
        ('drain-s = "soon"', "drain-s = 'soon': Input should be a valid number"),
        ("workers = [1]", "workers = [1]: Input should be a valid integer"),
        (
            'listen = ":5"',
            "listen = ':5': expected HOST:PORT or unix:PATH; change it there, or give --listen",
        ),
        (
            'log-level = "LOUD"',
            "log-level = 'LOUD': expected DEBUG, INFO, WARNING or ERROR; change",
        ),
        ('backend = "faiss"', "backend = 'faiss': got 'faiss', expected edge, exact, or the URL"),
        ('qdrant-prefix = "a b"', "qdrant-prefix = 'a b': String should match"),
        ("max_in_flight = 4", "unknown name 'max_in_flight'; near it: max-in-flight; names are"),
        ("max-in-fligth = 4", "unknown name 'max-in-fligth'; near it: max-in-flight"),
        (
            'qdrant-api-key = "secret"',
            "unknown name 'qdrant-api-key'; near it: qdrant-api-key-file",
        ),
        ("xyzzy = 4", "unknown name 'xyzzy'; names are those of the options"),
        ("[serve]\nworkers = 4", "unknown name 'serve'; near it: "),
        ("workers 4", "(at line 1, column 9); expected TOML"),
    ],
)
def test_nonsense_names_file_key_value_and_remedy(
    file: Path, data: Path, text: str, words: str
) -> None:
    file.write_text(text)
    said = _refused(file, "--data", str(data))
    assert said.startswith(f"router-service: {file}: ")
    assert words in said
    assert said.count("\n") == 1
    assert not data.exists()


def test_a_file_that_is_not_there_or_no_text(file: Path) -> None:
    assert _refused(file) == f"router-service: --config: {file}: No such file or directory\n"
    file.write_bytes(b"\xff\xfe")
    assert "expected TOML" in _refused(file)


def test_the_environment_is_named_where_it_is_wrong(
    file: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text("workers = 4")
    monkeypatch.setenv("ROUTER_SERVICE_WORKERS", "many")
    said = _refused(file, "--data", str(data))
    assert said.startswith("router-service: environment: ROUTER_SERVICE_WORKERS: Input should be")


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told(data: Path, tmp_path: Path, abstract: bool) -> None:
    place = f"@{tmp_path}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(f"\0{place[1:]}" if abstract else place)
        environment = os.environ | {"NOTIFY_SOCKET": place}
        with Sidecar(data, backend="exact", env=environment) as sidecar:
            assert told.recv(100) == b"READY=1"
            assert sidecar.stop() == 0
            assert told.recv(100) == b"STOPPING=1"


def test_a_notify_socket_of_nobody_ends_no_service(data: Path, tmp_path: Path) -> None:
    environment = os.environ | {"NOTIFY_SOCKET": str(tmp_path / "none")}
    with Sidecar(data, backend="exact", env=environment) as sidecar:
        assert sidecar.stop() == 0
        assert f"NOTIFY_SOCKET {tmp_path}/none: " in sidecar.stderr
