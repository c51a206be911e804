"""What benchmarks.compare says of made-up results, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from benchmarks.compare import GONE, NEW, NotComparable, app, verdicts

RATIOS = {"decode: replica": 1.03, "decode: remote": 1.5}


def result(ratios: dict[str, float] | None = None, **changes: Any) -> dict[str, Any]:
    settings = {"layers": 2, "keys": 20_000}
    made = {"benchmark": "end_to_end", "date": "2026-01-01", "machine": {"cpus": 2}}
    return made | {"settings": settings, "ratios": ratios or RATIOS} | changes


def compare(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture
def baseline(tmp_path: Path) -> Path:
    file, first = tmp_path / "baseline.json", tmp_path / "first.json"
    first.write_text(json.dumps(result()))
    done = compare(first, "--update", "--baseline", file)
    assert done.exit_code == 0, done.stderr
    return file


@pytest.mark.parametrize(
    ("ratios", "words", "code"),
    [
        (RATIOS, [], 0),
        (RATIOS | {"decode: replica": 1.12}, [], 0),
        (RATIOS | {"decode: replica": 1.4}, ["decode: replica", "1.030", "1.400", "slower"], 1),
        (RATIOS | {"decode: remote": 1.1}, ["decode: remote", "1.100", "faster"], 0),
        ({"decode: replica": 1.03}, ["decode: remote", "gone"], 1),
        (RATIOS | {"decode: hook": 1.0}, ["decode: hook", "new"], 0),
    ],
)
def test_says_what_became_slower(
    baseline: Path, tmp_path: Path, ratios: dict[str, float], words: list[str], code: int
) -> None:
    (tmp_path / "now.json").write_text(json.dumps(result(ratios)))
    done = compare(tmp_path / "now.json", "--baseline", baseline)
    assert done.exit_code == code, done.stderr
    assert all(word in done.stdout for word in words)
    assert ("slower" in done.stdout) == ("slower" in words)


def test_the_tolerance_can_be_given(baseline: Path, tmp_path: Path) -> None:
    (tmp_path / "now.json").write_text(json.dumps(result(RATIOS | {"decode: replica": 1.12})))
    done = compare(tmp_path / "now.json", "--baseline", baseline, "--tolerance", "0.05")
    assert done.exit_code == 1


def test_other_settings_are_not_compared(baseline: Path, tmp_path: Path) -> None:
    (tmp_path / "now.json").write_text(json.dumps(result(settings={"layers": 4, "keys": 20_000})))
    done = compare(tmp_path / "now.json", "--baseline", baseline)
    assert done.exit_code == 2
    assert "layers: 2 then, 4 now" in done.stderr


def test_a_benchmark_that_the_baseline_lacks_is_named() -> None:
    with pytest.raises(NotComparable, match="load: not in the baseline, which has end_to_end"):
        list(verdicts(result(benchmark="load"), {"end_to_end": result()}, 0.2))


def test_an_update_leaves_other_benchmarks_as_they_are(baseline: Path, tmp_path: Path) -> None:
    other = result({"p99: 4 runners": 2.0}, benchmark="load", settings={})
    (tmp_path / "load.json").write_text(json.dumps(other))
    assert compare(tmp_path / "load.json", "--update", "--baseline", baseline).exit_code == 0
    kept = json.loads(baseline.read_text())
    assert {name: each["ratios"] for name, each in kept.items()} == {
        "end_to_end": RATIOS,
        "load": {"p99: 4 runners": 2.0},
    }
    found = list(verdicts(result({"decode: hook": 1.0}), kept, 0.2))
    assert sorted(each.word for each in found) == sorted([NEW, GONE, GONE])
