"""A few rounds of the fault suite; `make faults` runs all of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.faults import suite
from tests.faults.crash import Lost, Wrong
from tests.faults.rounds import CannotRun, Found, Round

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
# Of the service, its input and its backend.
FEW = ["SIGSTOP", "bad upserts", "connections reset"]


def test_nothing_is_lost_and_nothing_wrong() -> None:
    lines: list[str] = []
    few = suite.Suite(suite.chosen(FEW), 3, lines.append)
    few.run(0, rounds=1, scale=0.05)
    assert not few.is_broken, lines
    assert few.rounds == dict.fromkeys(few.found, 1)
    assert len(few.found) == len(FEW)
    assert all(found.injected and found.writes and found.lookups for found in few.found.values())


def loses(_: Round) -> None:
    raise Lost(["entry 1: found None", "entry 2: found None"])


def answers_wrong(_: Round) -> None:
    raise Wrong("looked 1 up, found 2")


def ends_in_a_defect(round_: Round) -> None:
    round_.injects()
    round_.require(holds=False, otherwise="INTERNAL")


def is_well(round_: Round) -> None:
    round_.injects(2)
    round_.found.recoveries_s += [0.25, 3.0]


def cannot_run(_: Round) -> None:
    raise CannotRun("needs root")


@pytest.mark.parametrize("broken", [loses, answers_wrong, ends_in_a_defect])
def test_what_must_not_be_is_the_status(
    broken: suite.Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "FAULTS", {"this": broken, "well": is_well})
    words = ["--rounds", "1", "--out", str(tmp_path)]
    assert suite.main([*words, "--only", "well"]) == 0
    assert suite.main(words) == 1
    found = json.loads((tmp_path / "faults.json").read_text())["faults"]["this"]
    assert found["lost"] + found["wrong"] + found["defects"] != []


def test_each_round_has_a_seed_of_its_own() -> None:
    seeds: list[int] = []
    said: list[str] = []
    made = suite.Suite({"this": lambda round_: seeds.append(round_.seed)}, 5, said.append)
    made.run(0, rounds=3)
    assert seeds == [5, 6, 7]
    assert "seed 7" in said[-1]


def test_the_table() -> None:
    made = suite.Suite({"well": is_well, "loses": loses, "none": cannot_run}, 0, lambda _: None)
    made.run(0)
    head, _, *rows = suite.table(made.found, made.left_out).splitlines()
    cells = [[cell.strip() for cell in row[1:-1].split("|")] for row in rows]
    assert {len(row) for row in cells} == {len(head[1:-1].split("|"))}
    assert cells[0] == ["well", "2", "0", "0", "0", "0", "0", "1.6 s", "3.0 s"]
    assert cells[1][4] == "2"
    assert cells[2][:2] == ["none", "not run: needs root"]


def test_the_page_has_every_fault(tmp_path: Path) -> None:
    text = suite.table({name: Found() for name in suite.FAULTS}, {})
    rows = [line.split("|")[1] for line in text.splitlines()]
    assert [
        line.split("|")[1] for line in PAGE.read_text().splitlines() if line in _table()
    ] == rows
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text())
    suite.put_into(page, "another table\n")
    assert "another table\n<!-- end -->" in page.read_text()
    assert "SIGKILL while idle" not in page.read_text()


def _table() -> list[str]:
    return [line for line in PAGE.read_text().splitlines() if line.count("|") == 10]
