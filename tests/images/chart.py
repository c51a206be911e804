"""Renders and lints docker/helm/knn-moe with Helm's own library, in a process of its own: it brings Go's runtime along.

from tests.images.chart import EXAMPLES, rendered
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from typing import Any

import yaml

from tests.images.compose import load_yaml
from tests.images.dockerfile import DOCKER

CHART = DOCKER / "helm" / "knn-moe"
EXAMPLES = sorted((DOCKER / "helm" / "examples").glob("*.yaml"))
_NOTES = "NOTES.txt"
_ASK = """
import json, sys
import helm_python

values = json.load(sys.stdin)
reply = {"lint": helm_python.lint(sys.argv[1], values, strict=True)}
try:
    with helm_python.Chart.load(sys.argv[1]) as chart:
        chart.validate_schema(values)
        reply["templates"] = chart.render(values, name="demo", namespace="prod")
except helm_python.HelmError as error:
    reply["error"] = str(error)
print(json.dumps(reply))
"""


class ChartError(Exception):
    """Helm's words for values that it, the schema or the chart refuses."""


def rendered(values: dict[str, Any]) -> list[dict[str, Any]]:
    """The manifests that `helm template demo --namespace prod` makes of values. Raises ChartError."""
    reply = _asked(values)
    if "error" in reply:
        raise ChartError(reply["error"])
    texts = [text for path, text in sorted(reply["templates"].items()) if not path.endswith(_NOTES)]
    return [each for text in texts for each in yaml.safe_load_all(text) if each]


def linted(values: dict[str, Any]) -> list[str]:
    """What `helm lint --strict` complains of: errors, then warnings."""
    lint = _asked(values)["lint"]
    return lint["errors"] + [each["error"] for each in lint["messages"] if each["severity"] > 1]


def example(name: str) -> dict[str, Any]:
    """The values of an example."""
    values: dict[str, Any] = load_yaml(DOCKER / "helm" / "examples" / f"{name}.yaml")
    return values


def _asked(values: dict[str, Any]) -> dict[str, Any]:
    return _answer(json.dumps(values))


@cache
def _answer(values: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", _ASK, CHART],
        input=values,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    reply: dict[str, Any] = json.loads(done.stdout)
    return reply
