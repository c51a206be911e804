"""What docs/monitoring.md and docs/monitoring/ name is what a service exposes."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from prometheus_client.parser import text_string_to_metric_families

from model_runner.vllm.http import metric_lines
from router_service.rpc.server import RoutingServer
from router_service.settings import ServiceSettings

DOCS = Path(__file__).parents[2] / "docs"


def exposed(tmp_path: Path) -> set[str]:
    """Names of families, of counters with their _total."""
    server = RoutingServer(ServiceSettings(data=tmp_path, backend="exact"))
    page = server.pages()["/metrics"]()
    server.stop()
    families = text_string_to_metric_families(page.body.decode())
    names = {each.name + "_total" * (each.type == "counter") for each in families}
    return {name for name in names if name.startswith("knnmoe_")}


def described(begins: str) -> set[str]:
    """The names in the first column of tables whose first name begins so."""
    lines = (DOCS / "monitoring.md").read_text().splitlines()
    rows = [line.split(" | ")[0] for line in lines if line.startswith(f"| `{begins}")]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def test_every_metric_is_described(tmp_path: Path) -> None:
    assert described("knnmoe_") == exposed(tmp_path)


def test_the_dashboard_and_the_alerts_ask_for_what_is_there(tmp_path: Path) -> None:
    memory = {"lookups": 1, "fell_back": {"deadline": 1}, "staleness_s": 1.0}
    lines = metric_lines({"layers": 1, "hooked": 1, "memories": {"law": memory}})
    known = exposed(tmp_path) | {re.split("[{ ]", line)[0] for line in lines}
    series = {f"{name}{of}" for name in known for of in ("", "_bucket", "_sum", "_count")}
    for file in ("alerts.yaml", "grafana.json"):
        named = set(re.findall(r"\bknnmoe_\w+", (DOCS / "monitoring" / file).read_text()))
        assert named - series == set(), file


def test_what_to_do_about_an_alert_is_said() -> None:
    rules = yaml.safe_load((DOCS / "monitoring" / "alerts.yaml").read_text())["groups"][0]["rules"]
    assert described("Knnmoe") == {rule["alert"] for rule in rules}
