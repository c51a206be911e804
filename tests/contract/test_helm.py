"""The Helm chart: what it makes is valid for Kubernetes, confined, and of options that the service has."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from knnmoe.client import AdminClient, Credentials, ServiceRefused
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from typer.testing import CliRunner

from router_service.cli.serve import app
from tests.images.chart import CHART, EXAMPLES, ChartError, example, linted, rendered
from tests.images.compose import load_yaml
from tests.images.dockerfile import DOCKER, ROOT, read_stages
from tests.sidecar import Sidecar

SERVICE, BESIDE, EACH_NODE = "service", "beside-a-model", "on-each-node"
# The oldest that the chart is for, and the newest that there are schemas of.
KUBERNETES = ("1.29", kubernetes_validate.latest_version())
DATA, SOCKETS = "/var/lib/knnmoe", "/run/knnmoe"


@pytest.fixture(scope="module", params=[path.stem for path in EXAMPLES])
def manifests(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return rendered(example(request.param))


def of_kind(manifests: list[dict[str, Any]], *kinds: str) -> Iterator[dict[str, Any]]:
    yield from (each for each in manifests if each["kind"] in kinds)


def pod_of(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    [workload] = of_kind(manifests, "StatefulSet", "DaemonSet", "Deployment")
    pod: dict[str, Any] = workload["spec"]["template"]["spec"]
    return pod


def containers_of(pod: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {each["name"]: each for each in pod.get("initContainers", []) + pod["containers"]}


def sidecar_of(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    return containers_of(pod_of(manifests))["sidecar"]


def test_there_is_an_example_of_each_kind() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    kinds = {example(path.stem)["kind"] for path in EXAMPLES}
    assert kinds == set(schema["properties"]["kind"]["enum"])


@pytest.mark.parametrize("name", [path.stem for path in EXAMPLES])
def test_helm_has_nothing_to_complain_of(name: str) -> None:
    assert linted(example(name)) == []


@pytest.mark.parametrize("version", KUBERNETES)
def test_manifests_are_valid(manifests: list[dict[str, Any]], version: str) -> None:
    for manifest in manifests:
        kubernetes_validate.validate(manifest, version, strict=True)


def test_the_schemas_notice_a_field_that_there_is_not(manifests: list[dict[str, Any]]) -> None:
    [account] = of_kind(manifests, "ServiceAccount")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(account | {"automount": False}, KUBERNETES[0], strict=True)


def test_versions_are_those_of_the_package() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    chart = load_yaml(CHART / "Chart.yaml")
    assert (chart["version"], chart["appVersion"]) == (version, version)


def test_every_value_is_explained_by_the_schema_and_used() -> None:
    values = load_yaml(CHART / "values.yaml")
    schema = json.loads((CHART / "values.schema.json").read_text())["properties"]
    assert schema.keys() - {"global"} == values.keys()
    templates = "".join(path.read_text() for path in (CHART / "templates").iterdir())
    unused = {name for name in values if not re.search(rf'Values\.{name}\b|"{name}"', templates)}
    assert unused == set()


def test_the_service_has_these_options(manifests: list[dict[str, Any]]) -> None:
    arguments = sidecar_of(manifests)["args"]
    done = CliRunner().invoke(app, [*arguments, "--help"])
    assert (done.exit_code, arguments[0]) == (0, "serve"), done.output
    refused = CliRunner().invoke(app, [*arguments, "--no-such-option", "--help"])
    assert refused.exit_code == 2


def test_what_is_mounted_is_there_and_where_the_image_has_it(
    manifests: list[dict[str, Any]],
) -> None:
    pod = pod_of(manifests)
    claims = {
        claim["metadata"]["name"]
        for each in of_kind(manifests, "StatefulSet")
        for claim in each["spec"]["volumeClaimTemplates"]
    }
    known = {volume["name"] for volume in pod["volumes"]} | claims
    for container in containers_of(pod).values():
        assert {mount["name"] for mount in container["volumeMounts"]} <= known
    sidecar = sidecar_of(manifests)
    places = {mount["mountPath"] for mount in sidecar["volumeMounts"]}
    stage = read_stages(DOCKER / "sidecar.Dockerfile")[-1]
    assert {DATA, SOCKETS} == set(json.loads(stage.last("VOLUME").text))
    assert {DATA, "/tmp"} <= places
    by_socket = f"--listen=unix:{SOCKETS}/router.sock" in sidecar["args"]
    assert (SOCKETS in places) is by_socket
    files = [word.split("=")[1] for word in sidecar["args"] if "=/etc/" in word]
    assert files
    assert all(any(file.startswith(f"{place}/") for place in places) for file in files)


def test_every_container_is_confined(manifests: list[dict[str, Any]]) -> None:
    """Pod Security Standard `restricted`, but for the container that gives a hostPath to the service's user."""
    pod = pod_of(manifests)
    user = int(read_stages(DOCKER / "sidecar.Dockerfile")[-1].last("USER").text.split(":")[0])
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == user
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert not any(pod.get(name) for name in ("hostNetwork", "hostPID", "hostIPC"))
    for name, container in containers_of(pod).items():
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"]["drop"] == ["ALL"]
        if name == "model":  # the user's own
            continue
        assert context["readOnlyRootFilesystem"] is True
        assert container["resources"]["limits"]["memory"]
        assert context["capabilities"].get("add", []) == (["CHOWN"] if name == "prepare" else [])
        assert context.get("runAsUser", user) == (0 if name == "prepare" else user)
    on_hosts = [volume["name"] for volume in pod["volumes"] if "hostPath" in volume]
    [workload] = of_kind(manifests, "StatefulSet", "DaemonSet", "Deployment")
    assert on_hosts == (["socket"] if workload["kind"] == "DaemonSet" else [])


def test_there_is_time_to_end(manifests: list[dict[str, Any]]) -> None:
    """As in the unit of systemd: 50 s more than calls in flight have, after nobody is sent there any more."""
    pod, sidecar = pod_of(manifests), sidecar_of(manifests)
    [drain_s] = [int(w.split("=")[1]) for w in sidecar["args"] if w.startswith("--drain-s=")]
    sleep_s = int(
        sidecar.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [0, 0])[1]
    )
    assert pod["terminationGracePeriodSeconds"] >= drain_s + sleep_s + 50


def test_who_reaches_what() -> None:
    [policy] = of_kind(rendered(example(SERVICE)), "NetworkPolicy")
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    ports = [rule["ports"][0]["port"] for rule in policy["spec"]["ingress"]]
    assert ports == [50051, 9464]
    assert all(rule["from"] for rule in policy["spec"]["ingress"])
    assert not policy["spec"]["egress"]  # embedded: nothing to reach
    [policy] = of_kind(rendered(example(EACH_NODE)), "NetworkPolicy")
    assert [rule["ports"][0]["port"] for rule in policy["spec"]["ingress"]] == [9464]
    assert {port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]} == {
        53,
        6334,
    }
    beside = rendered(example(BESIDE))
    assert not list(of_kind(beside, "NetworkPolicy", "Service"))  # the model's own


def test_nodes_can_be_drained() -> None:
    for name, budgets in ((SERVICE, 1), (BESIDE, 1), (EACH_NODE, 0)):
        found = list(of_kind(rendered(example(name)), "PodDisruptionBudget"))
        assert [budget["spec"]["maxUnavailable"] for budget in found] == [1] * budgets


def test_a_model_starts_after_the_sidecar_and_is_ready_without_it() -> None:
    pod = pod_of(rendered(example(BESIDE)))
    [sidecar], [model] = pod["initContainers"], pod["containers"]
    assert (sidecar["name"], sidecar["restartPolicy"]) == ("sidecar", "Always")
    assert "readinessProbe" not in sidecar
    assert {"name": "socket", "mountPath": SOCKETS, "readOnly": True} in model["volumeMounts"]
    assert {"name": "models", "mountPath": "/models"} in model["volumeMounts"]


REFUSED = {
    "no image": ({"image": {"repository": ""}}, "image.repository"),
    "many embedded": ({"replicas": 3}, "replicas: got 3, expected 1 without qdrant.url"),
    "nobody asks who calls": ({"tokens": {}}, "needs tls.secretName and tokens.secretName"),
    "all can listen": ({"tls": {}}, "needs tls.secretName and tokens.secretName"),
    "an open socket": (
        {**example(EACH_NODE), "tokens": {}, "socket": {"mode": "666"}},
        "socket.mode: got 666, expected 600",
    ),
    "each node's own": ({"kind": "DaemonSet"}, "needs qdrant.url, or persistence.hostPath"),
    "beside, embedded": ({"kind": "Sidecar"}, "needs qdrant.url, or persistence.existingClaim"),
    "beside nothing": (
        {"kind": "Sidecar", "persistence": {"existingClaim": "law"}},
        "needs model.container",
    ),
    "misspelt": ({"replica": 2}, "replica"),
    "another kind": ({"kind": "Job"}, "kind"),
    "a number": ({"drainSeconds": "ten"}, "drainSeconds"),
    "no URL": ({"qdrant": {"url": "qdrant:6334"}}, "url"),
    "no option": ({"extraArgs": ["max-in-flight=3"]}, "extraArgs"),
}


@pytest.mark.parametrize(("changes", "words"), REFUSED.values(), ids=list(REFUSED))
def test_values_that_cannot_work_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ChartError, match=re.escape(words)):
        rendered(example(SERVICE) | changes)


def as_kubelet(volume: Path, files: dict[str, str]) -> None:
    """A secret as it is mounted, or what comes into its place: files are links into a directory that is exchanged."""
    volume.mkdir(parents=True, exist_ok=True)
    now = Path(tempfile.mkdtemp(dir=volume, prefix=".."))
    for name, text in files.items():
        (now / name).write_text(text)
        if not (volume / name).is_symlink():
            (volume / name).symlink_to(f"..data/{name}")
    (volume / "..new").symlink_to(now.name)
    (volume / "..new").rename(volume / "..data")


def tokens(secret: str) -> dict[str, str]:
    return {
        "tokens.toml": f'[[token]]\nname = "a"\nrole = "admin"\nmemories = "all"\nsecret = "{secret}"\n'
    }


def memories(service: Sidecar, secrets: Path, token: str) -> int:
    """How many there are, asked with a certificate and a token."""
    (secrets / "token").write_text(token)
    tls = secrets / "tls"
    credentials = Credentials(
        ca_file=tls / "ca.crt",
        cert_file=tls / "tls.crt",
        key_file=tls / "tls.key",
        token_file=secrets / "token",
    )
    with AdminClient(service.target, credentials=credentials) as client:
        return len(client.unary(client.admin.ListMemories, admin_pb.ListMemoriesRequest()).memories)


def test_the_service_starts_with_the_arguments_and_answers_the_probes(tmp_path: Path) -> None:
    """With TLS, certificates of clients, and tokens, which are exchanged while it runs; probes need none of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    secrets, own = tmp_path / "etc", ROOT / "tests" / "qdrant_standin"
    pem, key = ((own / f"localhost.{kind}").read_text() for kind in ("pem", "key"))
    as_kubelet(secrets / "tls", {"tls.crt": pem, "tls.key": key, "ca.crt": pem})
    as_kubelet(secrets / "tokens", tokens("a" * 32))
    container = sidecar_of(rendered(example(SERVICE) | {"metrics": {"port": port}}))
    replaced = ("serve", "--data=", "--listen=", "--drain-s=")
    flags = [word for word in container["args"] if not word.startswith(replaced)]
    flags = [word.replace("=/etc/knnmoe", f"={secrets}") for word in flags]
    probes = ("startupProbe", "readinessProbe", "livenessProbe")
    commands = [[sys.executable, *container[each]["exec"]["command"][1:]] for each in probes]
    with Sidecar(tmp_path / "data", backend="exact", flags=flags) as service:
        for command in commands:
            assert subprocess.run(command, check=False, timeout=60).returncode == 0
        assert memories(service, secrets, "a" * 32) == 0
        as_kubelet(secrets / "tokens", tokens("b" * 32))
        assert memories(service, secrets, "b" * 32) == 0
        with pytest.raises(ServiceRefused):
            memories(service, secrets, "a" * 32)
        service.stop_cleanly()
    for command in commands:
        done = subprocess.run(command, check=False, timeout=60, capture_output=True)
        assert done.returncode != 0
