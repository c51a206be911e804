"""The Dockerfiles keep to the rules, start commands that exist, and set settings that exist."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from knnmoe import probe

from tests.images.compose import service_variables
from tests.images.dockerfile import DOCKER, ROOT, in_context, read_stages, stages_of
from tests.images.dockerfile_rules import problems
from tests.qdrant_image import QDRANT_IMAGE

DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
GOOD = """\
FROM python:3.11-slim AS build
RUN pip install --no-cache-dir --constraint constraints.txt numpy
FROM python:3.11-slim
COPY --from=build /opt /opt
USER 10001:10001
HEALTHCHECK NONE
ENTRYPOINT ["router-service"]
"""


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_the_dockerfiles_keep_to_the_rules(path: Path) -> None:
    assert problems(read_stages(path)) == []


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_no_other_syntax_is_fetched(path: Path) -> None:
    """The engine's own reads them, also where no registry is reached."""
    assert "# syntax" not in path.read_text()


def test_the_rules_accept_a_good_file() -> None:
    assert problems(stages_of(GOOD)) == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("3.11-slim AS", "latest AS", "has no version"),
        ("python:3.11-slim AS", "python AS", "has no version"),
        (" --no-cache-dir", "", "without --no-cache-dir"),
        (" --constraint constraints.txt", "", "without --constraint"),
        ("RUN pip", "RUN apt-get install git && pip", "--no-install-recommends"),
        ("RUN pip", "RUN apt-get install git && pip", "leaves its lists"),
        ("RUN pip", "RUN if pip", "syntax error"),
        ("COPY --from=build /opt /opt", "ADD x /opt", "ADD"),
        ("COPY --from=build /opt /opt", "COPY tests /opt", "leaves it out"),
        ("COPY --from=build /opt /opt", "COPY absent /opt", "not there"),
        ("COPY --from=build /opt /opt", "WORKDIR opt", "relative"),
        ("COPY --from=build /opt /opt", "ENV API_KEY=5eed", "a secret"),
        ("USER 10001:10001", "USER root", "USER is not a number"),
        ("USER 10001:10001\n", "", "USER is not a number"),
        ("HEALTHCHECK NONE", "RUN true\nHEALTHCHECK NONE", "RUN after USER"),
        ("HEALTHCHECK NONE\n", "", "no HEALTHCHECK"),
        ("HEALTHCHECK NONE", "HEALTHCHECK CMD router-admin health", "exec form"),
        ('["router-service"]', "router-service", "exec form"),
        ("HEALTHCHECK NONE", 'HEALTHCHECK --start-interval=2s CMD ["x"]', "--start-interval needs"),
        ("RUN pip", "RUN --mount=type=cache,target=/x pip", "--mount needs"),
        ("COPY --from=build", "COPY --link --from=build", "--link needs"),
        ("COPY --from=build", "COPY --chmod=755 --from=build", "--chmod needs"),
        ("RUN pip", "RUN cat <<EOF && pip", "heredoc"),
    ],
)
def test_the_rules_find(old: str, new: str, problem: str) -> None:
    assert old in GOOD
    assert any(problem in found for found in problems(stages_of(GOOD.replace(old, new, 1))))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_the_images_start_commands_that_exist(path: Path) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    stage = read_stages(path)[-1]
    entrypoint, health = stage.last("ENTRYPOINT"), stage.last("HEALTHCHECK")
    assert entrypoint is not None
    assert health is not None
    assert entrypoint.command is not None
    assert entrypoint.command[0] in scripts
    assert health.command in (None, ["python", "-m", probe.__name__])


def test_the_probe_gives_up_before_its_health_check_does() -> None:
    health = read_stages(DOCKER / "sidecar.Dockerfile")[-1].last("HEALTHCHECK")
    assert health is not None
    assert float(health.flags["timeout"].removesuffix("s")) > probe.TIMEOUT_S


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_the_images_set_variables_that_exist(path: Path) -> None:
    known = service_variables() | {"ROUTER_ADMIN_TARGET", "MODEL_RUNNER_TARGET"}
    ours = ("ROUTER_SERVICE_", "ROUTER_ADMIN_", "MODEL_RUNNER_")
    variables = read_stages(path)[-1].variables()
    assert {name for name in variables if name.startswith(ours)} <= known


def test_runner_and_sidecar_are_one_user_at_one_socket() -> None:
    sidecar, runner = (
        read_stages(DOCKER / f"{name}.Dockerfile")[-1] for name in ("sidecar", "runner")
    )
    assert sidecar.last("USER") is not None
    assert (
        sidecar.variables()["ROUTER_SERVICE_LISTEN"] == sidecar.variables()["ROUTER_ADMIN_TARGET"]
    )
    assert sidecar.variables()["ROUTER_SERVICE_LISTEN"] == runner.variables()["MODEL_RUNNER_TARGET"]
    assert sidecar.last("USER").text == runner.last("USER").text  # type: ignore[union-attr]
    assert sidecar.base == runner.base


def test_the_sidecar_is_made_without_the_runner() -> None:
    copied = {
        word for i in read_stages(DOCKER / "sidecar.Dockerfile")[0].all("COPY") for word in i.words
    }
    assert "model_runner" not in copied
    assert "router_service" in copied


@pytest.mark.parametrize(
    ("path", "kept"),
    [
        ("router_service/cli/serve.py", True),
        ("docker/slim.sh", True),
        ("router_service/cli/__pycache__/serve.pyc", False),
        ("docker/secrets/qdrant-api-key", False),
        ("docker/compose.yaml", False),
        (".git/config", False),
        (".venv/bin/python", False),
        ("tests/sidecar.py", False),
        ("demo-results/results.json", False),
    ],
)
def test_the_build_context_is_what_the_images_are_made_of(path: str, kept: bool) -> None:
    assert in_context(path) is kept


def test_qdrant_is_of_the_minor_version_of_its_client() -> None:
    pinned = re.search(
        r"^qdrant-client==(\d+\.\d+)\.", (ROOT / "constraints.txt").read_text(), re.M
    )
    assert pinned is not None
    assert QDRANT_IMAGE.startswith(f"qdrant/qdrant:v{pinned.group(1)}.")


@pytest.mark.parametrize("name", ["smoke.sh", "exercise.sh", "node_loss.sh", "slim.sh", "torch.sh"])
def test_the_scripts_parse(name: str) -> None:
    script = DOCKER / name
    shell = script.read_text().partition("\n")[0].removeprefix("#!").split()[-1]
    subprocess.run([shell, "-n", script], check=True)
    assert script.stat().st_mode & 0o111


@pytest.mark.parametrize(
    ("engine", "compose", "said"),
    [
        ("19.03.15", "2.29.1", "the Docker engine is version 19.03.15, and these files need 20.10"),
        ("20.10.24+dfsg1", "1.29.2", "docker compose is version 1.29.2, and these files need 2.6"),
        ("28.0.4", "v2.5.0", "docker compose is version 2.5.0, and these files need 2.6"),
        ("20.10.24+dfsg1", "v2.6.0", ""),
    ],
)
def test_the_smoke_test_says_at_once_what_is_too_old(
    tmp_path: Path, engine: str, compose: str, said: str
) -> None:
    docker = tmp_path / "docker"
    docker.write_text(
        "#!/bin/sh\n"
        f'case "$*" in "version "*) echo {engine};; "compose version"*) echo {compose};; *) exit 9;; esac\n'
    )
    docker.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        [DOCKER / "smoke.sh", "embedded"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (2 if said else 9)
    assert (f"smoke.sh: {said}" in done.stderr) is bool(said)
