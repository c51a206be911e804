"""`router-admin` delete, prune and operations: results, questions, refusals and exit codes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import typer
from knnmoe import tensors
from typer.testing import CliRunner

from router_service.cli.admin import app
from router_service.cli.options import whole
from tests.integration.admin_uses import command_names
from tests.sidecar import LOGIT_DELTA, Sidecar, exported, random_entries

Admin = Callable[..., Any]


@pytest.fixture
def admin(ram_sidecar: Sidecar) -> Admin:
    """Runs `router-admin` on a service in RAM; `code` is the expected exit code."""

    def run(*arguments: str, code: int = 0, answer: str | None = None) -> Any:
        command = ["--target", ram_sidecar.target, *arguments]
        result = CliRunner().invoke(app, command, input=answer)
        assert result.exit_code == code, result.output
        assert "Traceback" not in result.output
        return result

    return run


@pytest.fixture
def memory(ram_sidecar: Sidecar, name: str) -> str:
    """40 entries in layer 0, 20 in layer 1; half of each of either source."""
    ram_sidecar.create(name, kind=LOGIT_DELTA, gamma=[0.05], model={"num_layers": 2})
    ram_sidecar.upsert(name, 0, random_entries(LOGIT_DELTA, 40))
    ram_sidecar.upsert(name, 1, random_entries(LOGIT_DELTA, 20, seed=2, first_id=100))
    return name


@pytest.fixture
def at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router_service.cli.output.on_terminal", lambda: True)


def _document(result: Any) -> Any:
    """The JSON document that is all of stdout."""
    return json.loads(result.stdout)


def _count(admin: Admin, name: str) -> int:
    return int(_document(admin("--json", "count", name))["total"])


def test_delete(admin: Admin, memory: str) -> None:
    counted = _document(admin("--json", "delete", memory, "--source", "text-1", "--dry-run"))
    assert (counted["deleted"], counted["dry_run"]) == (30, True)
    refused = admin("delete", memory, "--source", "text-1", code=2)
    assert "delete (30 entries) asks before it removes anything" in refused.stderr
    assert _count(admin, memory) == 60
    gone = admin("--json", "delete", memory, "--source", "text-1", "--layer", "1", "--yes")
    assert _document(gone) == {
        "memory": memory,
        "dry_run": False,
        "layers": [{"layer": 1, "deleted": 10, "entries": 20}],
        "deleted": 10,
    }
    told = admin(
        "delete", memory, "--source", "text-1", "--example", "example-3", "--yes", "--fsync"
    )
    assert f"deleted 4 entries of {memory}" in told.stdout
    assert _count(admin, memory) == 46


def test_delete_by_id(admin: Admin, memory: str, ram_sidecar: Sidecar) -> None:
    [entries] = exported(ram_sidecar, memory, 0)
    ids = [str(number) for number in tensors.to_array(entries.ids)[:2].tolist()]
    flags = [word for number in ids for word in ("--id", number)]
    assert _document(admin("--json", "delete", memory, *flags, "--yes"))["deleted"] == 2
    again = admin("--json", "delete", memory, *flags, "--yes", code=1)
    assert _document(again)["deleted"] == 0
    assert again.stderr == (
        f"router-admin: nothing to delete: {memory} has no entry of these ids\n"
    )


def test_sources(admin: Admin, memory: str) -> None:
    document = _document(admin("--json", "sources", memory))
    assert (document["entries"], document["unlisted_entries"]) == (60, 0)
    assert [(one["source"], one["entries"], one["examples"]) for one in document["sources"]] == [
        ("text-0", 30, 5),
        ("text-1", 30, 5),
    ]
    table = admin("sources", memory, "--layer", "1").stdout
    assert f"2 source(s) of {memory}, 20 entries" in table
    assert re.search(r"text-1 +10 +5 +20\d\d-.* UTC +20\d\d-.* UTC +0 *$", table, re.MULTILINE)


@pytest.mark.parametrize("flags", [["--yes"], ["--dry-run"], []])
@pytest.mark.parametrize(
    ("what", "words"),
    [
        (["texte-1"], "has no source 'texte-1'; near it: 'text-1', 'text-0'; `router-admin"),
        (["EXT"], "has no source 'EXT'; near it: 'text-0', 'text-1'; `router-admin"),
        (["genesis.txt"], "has no source 'genesis.txt'; `router-admin sources"),
        (
            ["text-1", "--example", "99"],
            "no entry of example '99' of source 'text-1' (30 entries of",
        ),
    ],
)
def test_a_deletion_that_finds_nothing_says_what_is_near(
    admin: Admin, memory: str, what: list[str], words: str, flags: list[str]
) -> None:
    done = admin("delete", memory, "--source", *what, *flags, code=1)
    assert words in done.stderr
    assert done.stderr.startswith("router-admin: nothing to delete: ")
    assert _count(admin, memory) == 60


@pytest.mark.parametrize("flags", [["--yes"], ["--dry-run"], []])
@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("texte-1", "has no source 'texte-1'; near it: 'text-1', 'text-0'; `router-admin"),
        ("text-1/99", "no entry of example '99' of source 'text-1' (30 entries of"),
    ],
)
def test_pruning_what_is_not_there_removes_nothing(
    admin: Admin, memory: str, wanted: str, words: str, flags: list[str]
) -> None:
    done = admin("prune", memory, "--forget", "text-0", "--forget", wanted, *flags, code=1)
    assert words in done.stderr
    assert done.stderr.startswith("router-admin: nothing to forget: ")
    assert _count(admin, memory) == 60


@pytest.mark.usefixtures("at_a_terminal")
def test_delete_asks_on_a_terminal(admin: Admin, memory: str) -> None:
    arguments = ("delete", memory, "--source", "text-1")
    asked = admin(*arguments, code=1, answer="n\n")
    assert f"Delete 30 entries of 2 layer(s) of {memory}?" in asked.stderr
    assert _count(admin, memory) == 60
    admin(*arguments, answer="y\n")
    assert _count(admin, memory) == 30


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ([], 2, "either --id (repeated for more) or --source"),
        (["--id", "1", "--source", "a"], 2, "either --id"),
        (["--id", "1", "--example", "a"], 2, "--example names an example"),
        (["--id", "-1"], 2, "--id"),
        (["--id", str(2**63)], 2, "--id"),
        (["--source", ""], 1, "filter.source"),
        (["--source", "a", "--layer", "2"], 1, "layer: got 2"),
    ],
)
def test_deletions_that_are_refused(
    admin: Admin, memory: str, flags: list[str], code: int, words: str
) -> None:
    assert words in admin("delete", memory, *flags, "--yes", code=code).stderr
    assert _count(admin, memory) == 60


def test_prune(admin: Admin, memory: str) -> None:
    flags = ("prune", memory, "--max-entries", "50%", "--by", "gain")
    dry = _document(admin("--json", *flags, "--dry-run"))
    assert (dry["entries"], dry["dropped"], dry["deleted"]) == (60, 30, 0)
    assert dry["layers"][0]["reasons"] == {"max_entries_by_gain": 20}
    assert dry["layers"][0]["expected_effect"]["queries"] == 40
    table = admin(*flags, "--dry-run").stdout
    for word in (
        "would be deleted; nothing was",
        "max_entries_by_gain 20",
        "expected effect",
        "lambda",
        "rescued       entries that a policy lets go and --keep-at-least keeps",
        "abstained     share of lookups that find nothing near",
    ):
        assert word in table
    lines, explained = table.splitlines(), re.findall(r"^ (\w+)  +\w", table, re.MULTILINE)
    headings = {word for line in lines if line.startswith(" layer ") for word in line.split()}
    assert headings - {"layer", "entries"} <= set(explained)
    assert "stdin is no terminal; pass --yes" in admin(*flags, code=2).stderr
    assert _count(admin, memory) == 60
    assert _document(admin("--json", *flags, "--yes"))["deleted"] == 30
    assert _count(admin, memory) == 30
    told = admin("prune", memory, "--forget", "text-1", "--forget", "text-0/example-0", "--yes")
    assert "deleted:" in told.stdout


@pytest.mark.parametrize(
    "flags",
    [
        ["--older-than", "30d"],
        ["--unused-below", "1", "--spare-newer-than", "1d"],
        ["--gain-below", "0.4"],
        ["--strength-below", "0"],
        ["--disagreeing-below", "-1"],
        ["--near-duplicates", "0.999", "--value-agreement", "0.99"],
        ["--max-entries", "40", "--by", "coverage"],
        ["--max-entries", "100%", "--by", "random", "--seed", "3"],
        ["--unused-below", "1", "--keep-at-least", "40"],
    ],
)
def test_plans_that_keep_all_of_a_young_memory(admin: Admin, memory: str, flags: list[str]) -> None:
    assert _document(admin("--json", "prune", memory, *flags, "--yes"))["deleted"] == 0
    assert _count(admin, memory) == 60


@pytest.mark.usefixtures("at_a_terminal")
def test_prune_shows_what_would_go_and_asks(admin: Admin, memory: str) -> None:
    flags = ("prune", memory, "--forget", "text-1")
    asked = admin(*flags, code=1, answer="n\n")
    assert f"Delete these 30 of 60 entries of {memory}?" in asked.stderr
    assert "forget 20" in asked.stderr
    assert _count(admin, memory) == 60
    admin(*flags, answer="y\n")
    assert _count(admin, memory) == 30


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ([], 2, "say what goes: --forget"),
        (["--keep-at-least", "3"], 2, "say what goes"),
        (["--older-than", "soon"], 2, "--older-than: got 'soon'"),
        (["--spare-newer-than", "7d"], 2, "--spare-newer-than goes with --unused-below"),
        (["--max-entries", "0", "--by", "age"], 2, "--max-entries: got '0'"),
        (["--max-entries", "5"], 2, "--max-entries and --by go together"),
        (["--by", "age"], 2, "--max-entries and --by go together"),
        (["--by", "beauty", "--max-entries", "5"], 2, "beauty"),
        (["--value-agreement", "0.5"], 2, "--near-duplicates"),
        (["--forget", "/"], 2, "--forget: got '/'"),
        (["--unused-below", "-1"], 2, "--unused-below"),
        (["--seed", "-1", "--gain-below", "0"], 2, "--seed"),
        (["--gain-below", "nan"], 1, "plan.gain_below: got nan"),
        (["--strength-below", "inf"], 1, "plan.strength_below"),
        (["--disagreeing-below", "3"], 1, "plan.agreement_below: got 3.0"),
        (["--near-duplicates", "2"], 1, "plan.near_duplicate_similarity: got 2.0"),
        (
            ["--near-duplicates", "0.9", "--value-agreement", "7"],
            1,
            "plan.near_duplicate_agreement",
        ),
        (
            ["--max-entries", "5", "--by", "age", "--keep-at-least", "6"],
            1,
            "plan.max_entries: got 5",
        ),
        (["--gain-below", "0", "--layer", "9"], 1, "layer: got 9"),
    ],
)
def test_plans_that_are_refused(
    admin: Admin, memory: str, flags: list[str], code: int, words: str
) -> None:
    refused = admin("prune", memory, *flags, "--yes", code=code)
    assert words in refused.stderr
    assert refused.stdout == ""
    assert _count(admin, memory) == 60


def test_operations(admin: Admin, memory: str) -> None:
    admin("prune", memory, "--gain-below", "-1", "--yes")
    [listed] = _document(admin("--json", "operations", "list", memory))["operations"]
    assert (listed["kind"], listed["memory"], listed["state"]) == ("prune", memory, "done")
    assert listed["id"] in admin("operations", "list").stdout
    assert _document(admin("--json", "operations", "show", listed["id"])) == listed
    assert "prune" in admin("operations", "show", listed["id"]).stdout
    assert "had ended already: done" in admin("operations", "cancel", listed["id"]).stdout
    for verb in ("show", "cancel"):
        assert "operation 'nope' not found" in admin("operations", verb, "nope", code=1).stderr


@pytest.mark.parametrize(
    "command",
    [
        ["delete", "nope", "--id", "1", "--yes"],
        ["prune", "nope", "--gain-below", "0", "--yes"],
        ["optimize", "nope"],
        ["delete", "../x", "--id", "1", "--yes"],
        ["prune", "a/b", "--gain-below", "0", "--yes"],
    ],
)
def test_a_missing_memory(admin: Admin, command: list[str]) -> None:
    assert f"memory '{command[1]}' not found" in admin(*command, code=1).stderr


@pytest.mark.parametrize(
    "words",
    ["memory show {}", "count {}", "sources {}", "prune {} --gain-below 0 --dry-run", "health"],
)
def test_json_before_or_after_the_command(admin: Admin, memory: str, words: str) -> None:
    command = words.format(memory).split()
    before, after = _document(admin("--json", *command)), _document(admin(*command, "--json"))
    for document in (before, after):
        for layer in document.get("layers", []):
            layer.pop("elapsed_s", None)
    assert before == after


@pytest.mark.parametrize(
    "words", ["--json --method none", "--method none --json", "--method none --json -"]
)
def test_json_after_quantize_whose_own_takes_a_file(admin: Admin, memory: str, words: str) -> None:
    assert _document(admin("quantize", memory, *words.split()))["memory"] == memory


def test_every_command_takes_json() -> None:
    for name in command_names():
        command: Any = typer.main.get_command(app)
        for word in name.split():
            command = whole(command.commands[word])
        assert any("--json" in one.opts for one in command.params), name
