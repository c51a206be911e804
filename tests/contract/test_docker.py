"""The Dockerfiles keep to the rules, start commands that exist, and set settings that exist."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from docs.generate_cli import commands, options_of
from tests.images.compose import service_variables
from tests.images.dockerfile import DOCKER, ROOT, in_context, read_stages, stages_of
from tests.images.dockerfile_rules import problems
from tests.qdrant_image import QDRANT_IMAGE

DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
COMMANDS = dict(commands())
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
    assert {entrypoint.command[0], (health.command or entrypoint.command)[0]} <= set(scripts)


def test_the_health_check_is_a_command_line_of_router_admin() -> None:
    health = read_stages(DOCKER / "sidecar.Dockerfile")[-1].last("HEALTHCHECK")
    assert health is not None
    name, flag, _, verb = health.command or []
    assert f"{name} {verb}" in COMMANDS
    assert flag in {flag for option in options_of(COMMANDS[name]) for flag in option.opts}


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


@pytest.mark.parametrize("name", ["smoke.sh", "exercise.sh", "slim.sh"])
def test_the_scripts_parse(name: str) -> None:
    script = DOCKER / name
    shell = script.read_text().partition("\n")[0].removeprefix("#!").split()[-1]
    subprocess.run([shell, "-n", script], check=True)
    assert script.stat().st_mode & 0o111
