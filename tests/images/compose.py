"""Reads compose files and joins them as `docker compose --file A --file B` does, as far as those in docker/ need it.

from tests.images.compose import SETUPS, load_setup
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from router_service.settings import QdrantSettings, ServiceSettings
from tests.images.dockerfile import DOCKER

# The ways to run that docker/README.md tells of.
SETUPS = {
    "embedded": ["compose.yaml"],
    "qdrant": ["compose.yaml", "compose.qdrant.yaml"],
    "cluster": ["compose.yaml", "compose.cluster.yaml"],
    "embedded-cuda": ["compose.yaml", "compose.cuda.yaml"],
    "cluster-cuda": ["compose.yaml", "compose.cluster.yaml", "compose.cuda.yaml"],
}


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is there twice, as compose does; PyYAML takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.value != "<<"]
        if len(keys) != len(set(keys)):
            raise yaml.constructor.ConstructorError(None, None, "a key twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load_yaml(path: Path) -> Any:
    """A YAML file. Raises YAMLError, also on a key that is there twice."""
    return yaml.load(path.read_text(), _StrictLoader)  # noqa: S506  # a SafeLoader


def load_setup(name: str) -> dict[str, Any]:
    """The project that the files of a set-up make, without x- parts."""
    return load_files(SETUPS[name])


def load_files(names: Sequence[str]) -> dict[str, Any]:
    """The project that files of docker/ make, in this order."""
    project: dict[str, Any] = {}
    for name in names:
        project = _merged(project, load_yaml(DOCKER / name))
    return {key: value for key, value in project.items() if not key.startswith("x-")}


def service_variables() -> set[str]:
    """Every environment variable that `router-service serve` reads."""
    plain = {f"ROUTER_SERVICE_{name.upper()}" for name in ServiceSettings.model_fields}
    return plain | {f"ROUTER_SERVICE_QDRANT_{name.upper()}" for name in QdrantSettings.model_fields}


def _merged(first: Any, second: Any) -> Any:
    """Mappings join key by key, lists are put together, all else is replaced; so is a command."""
    if isinstance(first, dict) and isinstance(second, dict):
        joined = {key: _merged(first[key], second[key]) for key in first.keys() & second.keys()}
        return first | second | joined
    if isinstance(first, list) and isinstance(second, list):
        return first + second
    return second
