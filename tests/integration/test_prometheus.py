"""docs/monitoring/ in a real Prometheus: every query of the dashboard has data, every rule can be evaluated."""

from __future__ import annotations

import json
import math
import re
import shutil
import socket
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import yaml
from knnmoe import tensors
from knnmoe.client import AdminClient, ReplicationClient

from model_runner.vllm.http import metric_lines
from router_service.telemetry.http import Page, PageServer
from tests.integration.test_metrics import FAR
from tests.scraping import url_of
from tests.sidecar import (
    CALL_TIMEOUT_S,
    EXPERTS,
    LOGIT_DELTA,
    Sidecar,
    exported,
    make_fingerprint,
    random_entries,
    random_keys,
    refusal,
    route_request,
)

FILES = Path(__file__).parents[2] / "docs" / "monitoring"
# Of each target, that went well.
SCRAPES = 6
pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="no prometheus and promtool (Debian's package prometheus)",
)


def expressions() -> list[str]:
    """Of every panel, with the variables that Grafana puts in."""
    panels = json.loads((FILES / "grafana.json").read_text())["panels"]
    found = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    return [each.replace("$__rate_interval", "1m").replace("$memory", ".*") for each in found]


class Prometheus:
    """One that scrapes and evaluates several times a second."""

    def __init__(self, directory: Path, targets: dict[str, str]) -> None:
        config = yaml.safe_load((FILES / "prometheus.yaml").read_text())
        config["global"] = dict.fromkeys(
            ("scrape_interval", "scrape_timeout", "evaluation_interval"), "500ms"
        )
        config["rule_files"] = [str(FILES / name) for name in config["rule_files"]]
        for job in config["scrape_configs"]:
            job["static_configs"] = [{"targets": [targets[job["job_name"]]]}]
        (directory / "config.yaml").write_text(yaml.safe_dump(config))
        command = ["prometheus", f"--config.file={directory}/config.yaml"]
        command += [f"--storage.tsdb.path={directory}/data", "--web.listen-address=127.0.0.1:0"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.url = f"http://{self._address()}"

    def _address(self) -> str:
        assert self.process.stderr is not None
        said = ""
        for line in self.process.stderr:
            said += line
            if "Server is ready" in line:
                return re.findall(r"Listening on.* address=(127\.0\.0\.1:\d+)", said)[0]
        raise AssertionError(said)

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}", timeout=CALL_TIMEOUT_S) as reply:  # noqa: S310
            return json.load(reply)["data"]

    def query(self, expression: str) -> list[float]:
        """The values that there are now."""
        found = self.get(f"query?query={quote(expression)}")["result"]
        values = [float(each["value"][1]) for each in found]
        return [value for value in values if not math.isnan(value)]

    def close(self) -> None:
        self.process.kill()
        self.process.wait(CALL_TIMEOUT_S)
        assert self.process.stderr is not None
        self.process.stderr.close()


@contextmanager
def looked_up(sidecar: Sidecar) -> Iterator[Callable[[], None]]:
    """A memory with a replica; each call looks tokens up, of which one is far away, and is refused once."""
    digest = sidecar.create("bible", kind=LOGIT_DELTA, gamma=[1.0])
    sidecar.upsert("bible", 0, random_entries(LOGIT_DELTA, 60))
    with AdminClient(sidecar.target) as admin:
        admin.optimize("bible")
    key = tensors.to_array(exported(sidecar, "bible", 0)[0].keys)[:1]
    own = random_keys(np.random.default_rng(0), 2, EXPERTS)
    request = route_request("bible", digest, np.concatenate([key, key + FAR]), own)
    unknown = route_request("nobody", digest, key, own[:1])

    def look() -> None:
        sidecar.route(request)
        refusal(sidecar.routing.Route, unknown)

    with ReplicationClient(sidecar.target, "bible", make_fingerprint()) as client:
        messages = client.replicate(heartbeat_ms=1000)
        while not next(messages).HasField("synced"):
            pass
        yield look


def model_page(scrapes: Iterator[int]) -> Page:
    """What vLLM with the plug-in adds to its own metrics, more each time."""
    number = next(scrapes)
    memory = {"lookups": 9 * number, "fell_back": {"deadline": number}, "staleness_s": None}
    status = {"layers": 3, "hooked": 3, "memories": {"bible": memory}}
    return Page(200, "".join(f"{line}\n" for line in metric_lines(status)).encode())


def test_every_panel_has_data_and_every_rule_is_sound(tmp_path: Path) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    with (
        Sidecar(tmp_path / "data", flags=("--metrics", "127.0.0.1:0")) as sidecar,
        closing(PageServer(listener, {"/metrics": partial(model_page, count(1))})) as model,
        looked_up(sidecar) as look,
    ):
        targets = {
            "knnmoe": url_of(sidecar).removeprefix("http://"),
            "vllm": f"127.0.0.1:{listener.getsockname()[1]}",
        }
        model.start()
        with closing(Prometheus(tmp_path, targets)) as prometheus:
            while prometheus.query("min(sum_over_time(up[1m]))") < [SCRAPES]:
                look()
            without = [each for each in expressions() if not prometheus.query(each)]
            assert without == [], sidecar.stderr
            rules = prometheus.get("rules")["groups"][0]["rules"]
        sidecar.close_channel()
    assert {rule["name"]: rule.get("lastError") for rule in rules if rule["health"] != "ok"} == {}


@pytest.mark.parametrize(
    ("alert", "series"),
    [
        ("KnnmoeDefect", {'knnmoe_refused_total{method="Route",reason="internal"}': "_x20 1x20"}),
        (
            "KnnmoeLookupsRefused",
            {
                'knnmoe_refused_total{method="RouteStream",reason="overloaded"}': "0+2x40",
                'knnmoe_lookups_total{where="service"}': "0+98x40",
            },
        ),
        (
            "KnnmoeFallsBack",
            {
                'knnmoe_fallback_total{memory="law",reason="deadline"}': "0+2x40",
                'knnmoe_model_lookups_total{memory="law"}': "0+98x40",
            },
        ),
        ("KnnmoeEngineRestarts", {"knnmoe_engine_restarts_total": "0x20 1 2 3 4x17"}),
        (
            "KnnmoeOperationFailed",
            {'knnmoe_operations_total{kind="prune",state="failed"}': "_x30 1x10"},
        ),
    ],
)
def test_an_alert_fires(alert: str, series: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text((FILES / "alerts.yaml").read_text())
    given = [{"series": name, "values": values} for name, values in series.items()]
    expected = {"eval_time": "31m", "alertname": alert}
    test = {"interval": "1m", "input_series": given, "alert_rule_test": [expected]}
    file = tmp_path / "test.yaml"
    file.write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "tests": [test]}))
    found = subprocess.run(
        ["promtool", "test", "rules", file], capture_output=True, text=True, check=False
    )
    # What is expected is that it does not fire, so that what it says need not be written here again.
    assert found.returncode == 1
    assert f'alertname="{alert}"' in found.stdout + found.stderr
