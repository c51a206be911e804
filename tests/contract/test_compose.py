"""The compose files hold together: names, versions, settings, confinement. docker/smoke.sh asks docker compose."""

from __future__ import annotations

import re
import subprocess
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from router_service.settings import ServiceSettings
from tests.images.compose import SETUPS, load_setup, load_yaml, service_variables
from tests.images.dockerfile import DOCKER, ROOT, read_stages
from tests.images.dockerfile_rules import is_pinned
from tests.qdrant_image import QDRANT_IMAGE

TOP_KEYS = {"name", "services", "networks", "volumes", "secrets"}
SERVICE_KEYS = {
    *("build", "image", "profiles", "pull_policy"),
    *("command", "depends_on", "deploy", "environment", "healthcheck", "init"),
    *("cap_drop", "read_only", "security_opt", "tmpfs", "ulimits"),
    *("networks", "restart", "secrets", "stop_grace_period", "volumes"),
}
HEALTH_KEYS = {"test", "interval", "timeout", "retries", "start_period"}
INDEXES = {"PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST"}
NO_INDEX = {"PIP_NO_INDEX", "PIP_FIND_LINKS"}
SERVICES = [
    pytest.param(service, id=f"{setup}-{name}")
    for setup in SETUPS
    for name, service in load_setup(setup)["services"].items()
]
QDRANT_NODES = [
    *(load_setup("qdrant")["services"][name] for name in ["qdrant"]),
    *(load_setup("cluster")["services"][f"qdrant-{n}"] for n in (1, 2, 3)),
]


@pytest.fixture(params=SETUPS)
def project(request: pytest.FixtureRequest) -> dict[str, Any]:
    return load_setup(request.param)


def test_every_file_is_in_a_setup_that_is_checked() -> None:
    assert {path.name for path in DOCKER.glob("compose*.yaml")} == {
        f for fs in SETUPS.values() for f in fs
    }


def test_the_keys_are_those_of_the_compose_specification(project: dict[str, Any]) -> None:
    assert set(project) <= TOP_KEYS
    for service in project["services"].values():
        assert set(service) <= SERVICE_KEYS
        assert set(service.get("healthcheck", {})) <= HEALTH_KEYS


@pytest.mark.parametrize("kind", ["networks", "secrets", "volumes"])
def test_what_is_used_is_declared_and_what_is_declared_is_used(
    project: dict[str, Any], kind: str
) -> None:
    used = {
        use.partition(":")[0] if kind == "volumes" else use
        for service in project["services"].values()
        for use in service.get(kind, [])
    }
    assert used == set(project.get(kind, {}))


def test_services_wait_for_services_that_have_a_health_check(project: dict[str, Any]) -> None:
    for service in project["services"].values():
        for name, how in service.get("depends_on", {}).items():
            assert how == {"condition": "service_healthy"}
            assert _has_health_check(project["services"][name])


@pytest.mark.parametrize("service", SERVICES)
def test_every_image_has_a_version(service: dict[str, Any]) -> None:
    assert is_pinned(service["image"])


@pytest.mark.parametrize("service", SERVICES)
def test_our_images_are_of_this_version_and_can_be_built(service: dict[str, Any]) -> None:
    if "build" not in service:
        assert service["image"] == f"{QDRANT_IMAGE}-unprivileged"
        return
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.fullmatch(rf"knnmoe/(sidecar|runner):{version}(-cuda)?", service["image"])
    assert service["pull_policy"] == "never"
    assert (DOCKER / service["build"]["context"]).resolve() == ROOT
    dockerfile = ROOT / service["build"]["dockerfile"]
    known = {name for stage in read_stages(dockerfile) for name in stage.variables("ARG")}
    assert set(service["build"].get("args", {})) <= known


@pytest.mark.parametrize("service", SERVICES)
def test_every_container_is_confined(service: dict[str, Any]) -> None:
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert [mount.partition(":")[0] for mount in service["tmpfs"]] == ["/tmp"]
    assert not any("docker.sock" in volume for volume in service["volumes"])


@pytest.mark.parametrize("service", SERVICES)
def test_volumes_lie_where_the_image_has_a_directory_of_its_user(service: dict[str, Any]) -> None:
    places = {volume.split(":")[1] for volume in service["volumes"]}
    if "build" not in service:
        assert places == {"/qdrant/storage", "/qdrant/snapshots"}
        return
    stage = read_stages(ROOT / service["build"]["dockerfile"])[-1]
    assert places == {
        word for i in stage.all("RUN") for word in re.findall(r"(/var/\S+|/run/\S+)", i.text)
    }


def test_only_the_runner_reaches_the_outside(project: dict[str, Any]) -> None:
    open_networks = {
        name for name, network in project["networks"].items() if not network.get("internal")
    }
    outside = {
        n for n, service in project["services"].items() if open_networks & set(service["networks"])
    }
    assert outside == {"runner"}


@pytest.mark.parametrize("setup", SETUPS)
def test_the_sidecar_takes_its_settings(
    setup: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    key.write_text("5eed\n")
    sidecar = load_setup(setup)["services"]["sidecar"]
    variables = read_stages(DOCKER / "sidecar.Dockerfile")[-1].variables() | sidecar["environment"]
    for name, value in variables.items():
        if name.startswith("ROUTER_SERVICE_"):
            monkeypatch.setenv(name, str(value).replace("/run/secrets/qdrant-api-key", str(key)))
    settings = ServiceSettings()
    if settings.backend == "edge":
        assert "secrets" not in sidecar
        return
    options = settings.qdrant.options(settings.backend)
    assert options.api_key == "5eed"
    assert options.replication_factor == (2 if setup.startswith("cluster") else None)


def test_settings_are_spelled_like_settings(project: dict[str, Any]) -> None:
    names = {n for s in project["services"].values() for n in s.get("environment", {})}
    assert {n for n in names if not n.startswith("QDRANT_")} <= service_variables()


def test_the_nodes_of_a_cluster_differ_from_one_server_in_nothing_else() -> None:
    own = {"depends_on", "environment", "volumes"}
    alike = [{key: node[key] for key in node.keys() - own} for node in QDRANT_NODES]
    assert alike == [alike[0]] * 4
    one, *nodes = (node["environment"] for node in QDRANT_NODES)
    for number, variables in enumerate(nodes, 1):
        assert one.items() <= variables.items()
        assert variables["QDRANT__CLUSTER__ENABLED"] == "true"
        assert variables["QDRANT_URI"] == f"http://qdrant-{number}:6335"
        assert variables.get("QDRANT_BOOTSTRAP") == (
            None if number == 1 else "http://qdrant-1:6335"
        )


@pytest.mark.parametrize("setup", ["qdrant", "cluster"])
def test_the_sidecar_is_given_every_node_by_its_own_name(setup: str) -> None:
    """A name of several would reach a server that another set-up left behind, too."""
    services = load_setup(setup)["services"]
    nodes = sorted(services.keys() - {"sidecar", "runner"})
    backend = ",".join(f"http://{node}:6334" for node in nodes)
    assert services["sidecar"]["environment"]["ROUTER_SERVICE_BACKEND"] == backend
    assert all(services[node]["networks"] == ["inside"] for node in nodes)


def test_the_images_are_built_from_whichever_index_is_given() -> None:
    services = load_setup("embedded")["services"]
    for name in ("sidecar", "runner"):
        arguments = services[name]["build"]["args"]
        assert {key for key, value in arguments.items() if value is None} == INDEXES
        known = read_stages(DOCKER / f"{name}.Dockerfile")[0].all("ARG")
        assert {i.text for i in known if "=" not in i.text} - {"CUDA"} == INDEXES | NO_INDEX
    assert services["runner"]["build"]["args"]["TORCH_INDEX"].startswith("${TORCH_INDEX:-https://")


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_the_health_check_of_qdrant_reads_its_answer(status: int, code: int) -> None:
    kind, *command = QDRANT_NODES[0]["healthcheck"]["test"]
    assert kind == "CMD"
    with _answering(status) as (port, paths):
        here = [word.replace("$$", "$").replace("6333", str(port)) for word in command]
        assert subprocess.run(here, check=False, timeout=20).returncode == code
    assert paths == ["/readyz"]


def test_the_health_check_of_qdrant_fails_where_nothing_listens() -> None:
    with _answering(200) as (port, _):
        pass
    command = QDRANT_NODES[0]["healthcheck"]["test"][1:]
    here = [word.replace("$$", "$").replace("6333", str(port)) for word in command]
    assert subprocess.run(here, check=False, capture_output=True, timeout=20).returncode != 0


@pytest.mark.parametrize("key", ["5eed\n", "", None])
def test_qdrant_starts_with_a_key_or_not_at_all(tmp_path: Path, key: str | None) -> None:
    entrypoint = tmp_path / "entrypoint.sh"
    entrypoint.write_text('#!/bin/sh\necho "key=$QDRANT__SERVICE__API_KEY"\n')
    entrypoint.chmod(0o755)
    if key is not None:
        (tmp_path / "key").write_text(key)
    command = [
        word.replace("$$", "$").replace("/run/secrets/qdrant-api-key", "key")
        for word in QDRANT_NODES[0]["command"]
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) is bool(key)
    assert done.stdout == ("key=5eed\n" if key else "")


def test_the_key_is_never_committed() -> None:
    path = load_yaml(DOCKER / "compose.qdrant.yaml")["secrets"]["qdrant-api-key"]["file"]
    assert path == "${QDRANT_API_KEY_FILE:-./secrets/qdrant-api-key}"
    assert "/docker/secrets/" in (ROOT / ".gitignore").read_text().splitlines()


def _has_health_check(service: dict[str, Any]) -> bool:
    if "healthcheck" in service:
        return True
    stage = read_stages(ROOT / service["build"]["dockerfile"])[-1]
    check = stage.last("HEALTHCHECK")
    return check is not None and check.text != "NONE"


@contextmanager
def _answering(status: int) -> Iterator[tuple[int, list[str]]]:
    """An HTTP server's port, and the paths that it was asked for."""
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:  # the name that http.server calls
            paths.append(self.path)
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.02])
        thread.start()
        try:
            yield server.server_port, paths
        finally:
            server.shutdown()
            thread.join()
