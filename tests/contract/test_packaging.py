"""What needs which dependency: the service no torch, what a worker of vLLM imports no transformers."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from model_runner.models import TRANSFORMERS
from tests.images.compose import load_yaml

ROOT = Path(__file__).parents[2]


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


def test_retrieval_needs_torch_and_nothing_else_of_the_runners_dependencies() -> None:
    """A process that serves a model with something else than transformers imports these."""
    blocked = (
        "import sys; sys.modules.update(dict.fromkeys(['transformers', 'accelerate', 'matplotlib', 'faiss']));"
        "import pkgutil, model_runner.replica as replica;"
        "[__import__(m.name) for m in pkgutil.walk_packages(replica.__path__, 'model_runner.replica.')];"
        "import model_runner.retrieval, model_runner.router_client, model_runner.routing_policy;"
        "from model_runner import RetrievalPolicy, RouterClient, open_retriever;"
        "assert 'torch' in sys.modules and 'model_runner.replica.search' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", blocked], check=True)


def test_the_range_of_transformers_is_the_one_that_is_checked() -> None:
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    ranges = {one.name: one.specifier for one in map(Requirement, extra["runner"])}
    assert ranges["transformers"] == SpecifierSet(TRANSFORMERS)


def test_the_lowest_versions_that_are_tested_are_the_lowest_that_are_allowed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lowest = {
        one.name: next(part.version for part in one.specifier if part.operator == ">=")
        for one in map(Requirement, project["dependencies"])
    }
    lines = (ROOT / "tests" / "lowest.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {name: Version(text) for name, text in tested.items()} == {
        name: Version(text) for name, text in lowest.items()
    }


def test_every_python_that_is_promised_is_run_in_the_workflow() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    promised = set(re.findall(r"Python :: (3\.\d+)", " ".join(project["classifiers"])))
    jobs = load_yaml(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]
    run = set(jobs["versions"]["strategy"]["matrix"]["python"])
    run |= {step.get("with", {}).get("python-version") for step in jobs["ci"]["steps"]} - {None}
    assert promised == run


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_a_missing_library_of_the_runner_is_one_line(missing: str) -> None:
    blocked = (
        f"import sys; sys.modules[{missing!r}] = None; from model_runner.cli import main;"
        f"sys.argv = ['model-runner', 'generate', '--model', '.', '--prompt', 'a']; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", blocked], capture_output=True, text=True, check=False
    )
    said = f"model-runner: {missing} is not installed; the runner needs it: pip install 'knn-moe[runner]'\n"
    assert (done.returncode, done.stderr) == (1, said)


def test_a_missing_harness_is_one_line() -> None:
    blocked = (
        "import sys; sys.modules['lm_eval'] = None; from model_runner.cli import main;"
        "sys.argv = ['model-runner', 'lm-eval', '--model', 'knn-moe', '--tasks', 'mmlu']; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", blocked], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert re.fullmatch(
        r"model-runner: lm_eval.* is not installed; the harness needs it: pip install 'knn-moe\[harness\]'\n",
        done.stderr,
    )


def test_the_wheel_has_the_files_of_the_dashboard() -> None:
    """All of them, and the licence of the library among them."""
    static = ROOT / "router_service" / "dashboard" / "static"
    files = {each.distribution_path for each in WheelBuilder(str(ROOT)).recurse_included_files()}
    there = {str(path.relative_to(ROOT)) for path in static.iterdir()}
    assert there <= files
    assert "MIT License" in (static / "chart.LICENSE.md").read_text()
    page = (static / "index.html").read_text()
    named = re.findall(r'(?:src|href)="/static/([^"]+)"', page)
    assert {f"router_service/dashboard/static/{name}" for name in named} <= there
    assert not re.search(r'(?:src|href)="(?!/static/|#)', page)  # nothing from elsewhere
