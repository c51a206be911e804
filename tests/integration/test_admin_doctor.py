"""`router-admin doctor` on real services, and on the directories that they leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from router_service.cli.admin import app
from tests.sidecar import LOGIT_DELTA, Sidecar, random_entries, running_sidecar


def doctor(*arguments: object, code: int = 0, target: str = "unix:/nowhere") -> list[Any]:
    """What is not fine; `code` is the expected exit code."""
    words = ["--json", "--target", target, "doctor", *map(str, arguments)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == code, result.output
    document = json.loads(result.stdout)
    assert document["sound"] is (code == 0)
    assert any(finding["check"] == "versions" for finding in document["findings"]) or code
    return [finding for finding in document["findings"] if finding["severity"] != "ok"]


def _filled(sidecar: Sidecar, name: str) -> None:
    sidecar.create(name, gamma=[0.1])
    for layer in range(3):
        sidecar.upsert(name, layer, random_entries(LOGIT_DELTA, 5))


def test_a_service_and_its_directory(data: Path) -> None:
    with running_sidecar(data) as sidecar:
        _filled(sidecar, "bible")
        assert doctor(target=sidecar.target) == []
        assert doctor("--deep", target=sidecar.target) == []
        [in_use] = doctor("--data", data)
        assert f"is served by process {sidecar.process.pid}" in in_use["what"]
        assert in_use["remedy"] == "router-admin doctor"
    assert doctor("--data", data) == []

    (data / "memories" / "bible" / "layer-001" / "CURRENT").write_text("{}")
    [broken] = doctor("--data", data, code=1)
    assert (broken["severity"], broken["check"]) == ("error", "bible")
    with running_sidecar(data) as sidecar:
        [aside] = doctor(target=sidecar.target, code=1)
        assert aside["what"].startswith("set aside when the service started: ")
        assert "router-admin snapshot restore bible" in aside["remedy"]


def test_layers_and_settings(ram_sidecar: Sidecar, name: str) -> None:
    ram_sidecar.create(name)
    findings = [f for f in doctor(target=ram_sidecar.target) if f["check"] == name]
    assert [f["remedy"] for f in findings] == [
        f"router-admin import FILE --into {name}",
        f"router-admin calibrate {name}",
    ]
    ram_sidecar.upsert(name, 1, random_entries(LOGIT_DELTA, 5))
    findings = [f for f in doctor(target=ram_sidecar.target) if f["check"] == name]
    assert findings[0]["remedy"] == f"router-admin memory set {name} --layers 1"


def test_entries_without_an_index(edge_sidecar: Sidecar, name: str) -> None:
    edge_sidecar.create(name, gamma=[0.1], layers=[0])
    for part in range(5):
        edge_sidecar.upsert(name, 0, random_entries(LOGIT_DELTA, 1000, part, 1 + 1000 * part))
    [found] = [f for f in doctor(target=edge_sidecar.target) if f["check"] == name]
    assert "layers 0 have 5000 entries or more" in found["what"]
    assert found["remedy"] == f"router-admin optimize {name}"


def test_nobody_answers(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/s"
    [finding] = doctor(code=1, target=address)
    assert finding["remedy"] == f"router-service serve --data DIR --listen {address}"


def test_people_see_findings_with_remedies(ram_sidecar: Sidecar, name: str) -> None:
    ram_sidecar.create(name)
    shown = CliRunner().invoke(app, ["--target", ram_sidecar.target, "doctor"])
    assert shown.exit_code == 0
    assert f"warning  {name}: gamma is 1 everywhere" in shown.stdout
    assert f"         -> router-admin calibrate {name}\n" in shown.stdout


def test_an_environment_that_no_service_would_start_with(tmp_path: Path) -> None:
    command = ["doctor", "--data", str(tmp_path)]
    refused = CliRunner().invoke(app, command, env={"ROUTER_SERVICE_MIN_FREE_MIB": "some"})
    assert refused.exit_code == 2
    assert "ROUTER_SERVICE_MIN_FREE_MIB" in refused.stderr
