"""What docs/monitoring.md names is what a service exposes."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

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


def test_every_metric_is_described(tmp_path: Path) -> None:
    rows = [
        line for line in (DOCS / "monitoring.md").read_text().splitlines() if line[:4] == "| `k"
    ]
    described = {
        name for row in rows for name in re.findall(r"`(knnmoe_\w+)`", row.split(" | ")[0])
    }
    assert described == exposed(tmp_path)
