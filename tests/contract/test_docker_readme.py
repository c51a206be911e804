"""docker/README.md names files, set-ups, commands and services that exist."""

from __future__ import annotations

import re

import pytest

from docs.generate_cli import commands
from tests.images.compose import SETUPS, load_setup, service_variables
from tests.images.dockerfile import DOCKER, ROOT

TEXT = (DOCKER / "README.md").read_text()
NAMES = {name for name, _ in commands()}


def test_every_set_up_is_told_of() -> None:
    told = set(re.findall(r"docker/compose[\w./:-]*\.yaml", TEXT))
    expected = {
        ":".join(f"docker/{f}" for f in files) for files in SETUPS.values() if len(files) < 3
    }
    assert expected - {"docker/compose.yaml:docker/compose.cuda.yaml"} <= told
    assert all((ROOT / file).is_file() for setup in told for file in setup.split(":"))


def test_every_file_is_there() -> None:
    files = re.findall(r"docker/(?!secrets)[\w.-]+\w", TEXT)
    assert files
    assert all((ROOT / file).exists() for file in files)


@pytest.mark.parametrize(
    "verb", sorted(set(re.findall(r"router-admin (?:sidecar )?((?:[a-z]+ ?)+)", TEXT)))
)
def test_every_admin_command_is_there(verb: str) -> None:
    first, *rest = verb.split()
    assert f"router-admin {first}" in NAMES or f"router-admin {first} {rest[0]}" in NAMES


@pytest.mark.parametrize("verb", sorted(set(re.findall(r"\brunner ([a-z]+) --", TEXT))))
def test_every_command_of_the_runner_is_there(verb: str) -> None:
    assert f"model-runner {verb}" in NAMES


def test_every_variable_and_volume_is_there() -> None:
    assert set(re.findall(r"ROUTER_SERVICE_\w+", TEXT)) <= service_variables()
    volumes = {v for setup in SETUPS for v in load_setup(setup)["volumes"]}
    assert set(re.findall(r"qdrant-\d?-?s[a-z]+", TEXT)) <= volumes
