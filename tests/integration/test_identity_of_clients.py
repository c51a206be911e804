"""The clients of a service with TLS and tokens: the runner, its commands, replicas, router-admin and the dashboard."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import pytest
from knnmoe.client import ConnectionMismatch, Credentials, ServiceRefused
from knnmoe.credentials import FILES, variable
from knnmoe.v1.types_pb2 import MemorySettings
from typer.testing import CliRunner

from model_runner import RoutingMemory
from model_runner.errors import BadInput
from model_runner.vllm.config import Config, configured
from router_service.cli.admin import app
from tests.integration.command_runs import Done, Run, in_process
from tests.integration.identities import SECRETS, Place, token_table, write
from tests.integration.runner_parts import SENTENCES, build, generate, loaded_model, write_text
from tests.integration.server_snapshots import until
from tests.sidecar import CALL_TIMEOUT_S, Sidecar
from tests.tiny_checkpoint import save_checkpoint

WIDE = MemorySettings(gamma=[1e-3])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("clients"))


@pytest.fixture(scope="module")
def serving(place: Place) -> Iterator[Sidecar]:
    """TLS, tokens, a memory `law`, and a dashboard."""
    flags = place.flags(tls=True, tokens=True)
    with Sidecar(
        place.directory / "data",
        backend="exact",
        flags=[*flags, "--dashboard", "127.0.0.1:0", "--log-level", "DEBUG"],
    ) as sidecar:
        with pytest.MonkeyPatch.context() as patch:
            in_environment(patch, place, "root")
            build(sidecar.target, "law", "recommended", settings=WIDE)
        yield sidecar
        assert sidecar.stop() == 0
        assert not [name for name, secret in SECRETS.items() if secret in sidecar.stderr]


def in_environment(patch: pytest.MonkeyPatch, place: Place, token: str | None) -> None:
    patch.setenv("KNNMOE_CA_FILE", str(place.authority.ca))
    if token is not None:
        patch.setenv("KNNMOE_TOKEN_FILE", str(place.files[token]))


def memory(target: str, credentials: Credentials | None = None, **options: object) -> RoutingMemory:
    given = {"timeout_s": CALL_TIMEOUT_S, "target": target, "credentials": credentials} | options
    return RoutingMemory(loaded_model(), "law", **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("where", ["replica", "remote"])
def test_a_routing_memory_takes_credentials(serving: Sidecar, place: Place, where: str) -> None:
    credentials = place.credentials("reader", ca_file=place.authority.ca)
    with memory(serving.target, credentials, retrieval=where) as entered:
        generate(loaded_model().model)
        entered.explain("Know ye not?")
        with pytest.raises(ServiceRefused, match="needs the role learn"):
            entered.learn("Know ye not that ye are the temple?")
    assert not entered.report.fallbacks
    assert entered.report.tokens


def test_authentication_is_never_fallen_back_from(serving: Sidecar, place: Place) -> None:
    for token in (None, "wrong"):
        credentials = place.credentials(token, ca_file=place.authority.ca)
        with pytest.raises(ServiceRefused) as refused, memory(serving.target, credentials):
            pass
        assert refused.value.code is grpc.StatusCode.UNAUTHENTICATED
    with pytest.raises(ConnectionMismatch), memory(serving.target, Credentials()):
        pass


def test_a_replica_goes_on_when_its_token_is_replaced(tmp_path: Path) -> None:
    place = Place(tmp_path / "place")
    token = write(tmp_path / "token", SECRETS["all"])
    credentials = Credentials(ca_file=place.authority.ca, token_file=token)
    flags = place.flags(tls=True, tokens=True)
    with Sidecar(tmp_path / "data", backend="exact", flags=flags) as sidecar:
        with pytest.MonkeyPatch.context() as patch:
            in_environment(patch, place, "root")
            build(sidecar.target, "law", "recommended", settings=WIDE)
        with memory(sidecar.target, credentials, retrieval="replica") as entered:
            follower = entered._open.opened.follower  # type: ignore[union-attr]
            assert follower is not None
            noted = threading.Event()
            note = follower._note
            follower._note = lambda failed: (noted.set(), note(failed))[1]  # type: ignore[method-assign]
            new = "another-token-" + "5" * 30
            write(place.tokens, token_table("root") + token_table("all", new))
            assert noted.wait(CALL_TIMEOUT_S)
            generate(loaded_model().model)
            write(token, new)
            with pytest.MonkeyPatch.context() as patch:
                in_environment(patch, place, "root")
                build(sidecar.target, "law", "recommended", settings=WIDE)
            until(lambda: follower.staleness_s < 2 and follower._failure is None)
            entered.explain("Know ye not?")
        assert not entered.report.fallbacks


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Each time as a process of its own would, without what the last command put into the environment."""
    command = in_process(monkeypatch, capsys)

    def run_alone(*arguments: object) -> Done:
        for name in FILES:
            monkeypatch.setenv(variable(name), "")
        return command(*arguments)

    return run_alone


def test_model_runner_takes_files_before_the_command(
    serving: Sidecar, place: Place, run: Run, tmp_path: Path
) -> None:
    model, text = (
        save_checkpoint(tmp_path / "tiny"),
        write_text(tmp_path / "t.jsonl", SENTENCES[:1]),
    )
    where = ["evaluate", "--target", serving.target, "--model", model, "--memory", "law"]
    where += ["--text", text]
    ca, token = ["--ca-file", place.authority.ca], ["--token-file", place.files["reader"]]
    done = run(*ca, *token, *where)
    assert done.code == 0, done.err
    done = run(*where)
    assert (done.code, len(done.err.splitlines())) == (3, 1), done.err
    assert "it speaks TLS: name its authority with --ca-file" in done.err
    done = run(*ca, "--token-file", tmp_path / "none", *where)
    assert (done.code, "none: No such file" in done.err) == (2, True), done.err


def test_model_runner_without_a_token(serving: Sidecar, place: Place, run: Run) -> None:
    done = run(
        "--ca-file", place.authority.ca, "calibrate", "--target", serving.target, "--memory", "law"
    )
    assert done.code == 1
    assert "asks for a token: name its file with --token-file or KNNMOE_TOKEN_FILE" in done.err


def test_router_admin_takes_them_from_options_or_the_environment(
    serving: Sidecar, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def admin(*words: object) -> tuple[int, str]:
        ran = CliRunner().invoke(app, ["--target", serving.target, *map(str, words)])
        return ran.exit_code, ran.output

    ca, token = ("--ca-file", place.authority.ca), ("--token-file", place.files["all"])
    code, said = admin(*ca, *token, "memory", "list")
    assert code == 0
    assert "law" in said
    code, said = admin(*token, "memory", "list")
    assert (code, len(said.splitlines())) == (3, 1)
    assert "it speaks TLS: name its authority with --ca-file or KNNMOE_CA_FILE" in said
    code, said = admin(*ca, "memory", "list")
    assert (code, len(said.splitlines())) == (1, 1)
    assert "KNNMOE_TOKEN_FILE" in said
    in_environment(monkeypatch, place, "all")
    assert admin("memory", "list")[0] == 0
    code, said = admin("--token-file", place.directory / "none", "memory", "list")
    assert (code, len(said.splitlines())) == (2, 1)


def test_the_plug_in_of_vllm_names_files(place: Place) -> None:
    files = {"ca_file": str(place.authority.ca), "token_file": str(place.files["all"])}
    config = configured({"knn_moe": {"memory": "law", **files}})
    assert config is not None
    assert config.credentials() == place.credentials("all", ca_file=place.authority.ca)
    with pytest.raises(BadInput, match="none: No such file"):
        Config(memory="law", token_file=str(place.directory / "none"))


def test_the_dashboard_reads_with_a_token_of_its_own(serving: Sidecar) -> None:
    assert serving.process.stdout is not None
    url = serving.process.stdout.readline().decode().removeprefix("dashboard on ").strip()

    def overview() -> tuple[int, bytes]:
        connection = HTTPConnection(urlsplit(url).netloc, timeout=CALL_TIMEOUT_S)
        connection.request("GET", "/api/overview")
        reply = connection.getresponse()
        found = reply.status, reply.read()
        connection.close()
        return found

    status, body = overview()
    assert status == 200, body
    assert "law" in json.dumps(json.loads(body))
    assert "asks nobody for a token" in serving.stderr
    children = subprocess.run(
        ["ps", "-eww", "-o", "args"], capture_output=True, text=True, check=True
    )
    [line] = [
        each
        for each in children.stdout.splitlines()
        if "router_service.dashboard" in each and "knnmoe-" in each
    ]
    assert len(line.split()[-1]) < 10  # a descriptor
