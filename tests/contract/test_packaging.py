"""The base distribution is the service: nothing of torch in its dependencies, nothing of it at import."""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires


def _closure(package: str, seen: set[str]) -> set[str]:
    if package in seen:
        return seen
    seen.add(package)
    try:
        lines = requires(package) or []
    except PackageNotFoundError:  # of another platform
        return seen
    for line in lines:
        if "extra ==" not in line:
            name = re.match(r"[A-Za-z0-9._-]+", line)
            assert name is not None
            _closure(name.group().lower().replace("_", "-"), seen)
    return seen


def test_no_torch_in_the_base_dependencies() -> None:
    closure = _closure("knn-moe", set())
    assert "qdrant-edge-py" in closure
    assert not closure & {"torch", "transformers", "accelerate", "matplotlib"}


def test_the_service_starts_where_torch_cannot_be_imported() -> None:
    blocked = (
        "import sys; sys.modules.update(torch=None, transformers=None);"
        "import router_service.rpc.server, router_service.cli.serve, router_service.cli.admin;"
        "import router_service.backends.edge.backend, router_service.backends.exact"
    )
    subprocess.run([sys.executable, "-c", blocked], check=True)
