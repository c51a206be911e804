"""`model-runner explain`, and what `evaluate` says of tokens, as their users run them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.integration.command_runs import Run, in_process
from tests.integration.runner_parts import FILE_NAME, LENGTH, write_text
from tests.sidecar import Sidecar
from tests.tiny_checkpoint import save_checkpoint

HELD_OUT = ("Know ye not that ye are the temple?", "Let not your heart be troubled, 1984.")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `model-runner` in this process."""
    return in_process(monkeypatch, capsys)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    return write_text(tmp_path / "held-out.jsonl", HELD_OUT)


@pytest.fixture
def common(run: Run, edge_sidecar: Sidecar, name: str, model: Path, tmp_path: Path) -> list[object]:
    """Options of every command; the memory is built with them."""
    text = write_text(tmp_path / FILE_NAME)
    found = ["--memory", name, "--model", model, "--target", edge_sidecar.target]
    found += ["--window", LENGTH, "--quiet"]
    assert run("build", "--reference", text, "--general-windows", 0, *found).code == 0
    return found


def test_the_changes_of_its_tokens_add_up_to_what_evaluate_says(
    run: Run, common: list[object], held_out: Path, tmp_path: Path
) -> None:
    page, tokens, documents = (tmp_path / name for name in ("x.html", "t.parquet", "d.jsonl"))
    evaluated = run(
        *("evaluate", "--text", held_out, "--json", "-", "--retrieval", "remote"),
        *("--per-token", tokens, "--per-document", documents, *common),
    )
    explained = run("explain", "--text", held_out, "--json", "-", "--html", page, *common)
    assert (evaluated.code, explained.code) == (0, 0)
    scores, found = json.loads(evaluated.out), json.loads(explained.out)
    rows = pq.read_table(tokens).to_pylist()
    total = scores["knn_moe"]["delta"] * len(rows)
    assert total == pytest.approx(found["change_sum"], abs=1e-4)
    assert total == pytest.approx(sum(row["change"] for row in rows), abs=1e-4)
    every = [
        (window["example"], token["position"], token["text"], token["class"], token["change"])
        for window in found["windows"]
        for token in window["tokens"]
        if "change" in token
    ]
    assert [each[:4] for each in every] == [
        (row["example"], row["position"], row["text"], row["class"]) for row in rows
    ]
    assert [each[4] for each in every] == pytest.approx([row["change"] for row in rows], abs=1e-4)
    by_document = [json.loads(line) for line in documents.read_text().splitlines()]
    assert [row["name"] for row in by_document] == ["1", "2"]
    assert sum(row["change"] * row["tokens"] for row in by_document) == pytest.approx(
        total, abs=1e-4
    )
    assert any(case["snippet"] for case in found["cases"])
    assert "helped most" in explained.err
    assert page.read_text().startswith("<!doctype html>")


def test_evaluate_says_which_class_of_tokens_gains(
    run: Run, common: list[object], held_out: Path
) -> None:
    done = run("evaluate", "--text", held_out, "--json", "-", *common)
    scores = json.loads(done.out)
    classes = scores["classes"]
    assert list(classes) == ["whitespace", "punctuation", "digits", "words"]
    assert classes["digits"]["tokens"] == 4
    assert sum(row["share_of_tokens"] for row in classes.values()) == pytest.approx(1)
    assert sum(row["share_of_change"] for row in classes.values()) == pytest.approx(1)
    # A replica's arithmetic is not the sidecar's to the last bit: what is reported is the same.
    found = json.loads(run("explain", "--text", held_out, "--json", "-", *common).out)
    assert scores["retrieval"] == "replica"
    assert scores["knn_moe"]["delta"] == pytest.approx(
        found["change_sum"] / found["tokens"], abs=1e-4
    )
    assert "4 digits" in done.err
    assert "with memory" in done.err


def test_a_prompt_is_explained(run: Run, common: list[object]) -> None:
    done = run("explain", "--prompt", "Blessed are the meek", *common)
    assert done.code == 0
    assert "19 tokens" in done.out
    assert "helped most" in done.out


def test_the_page_alone_on_standard_output(
    run: Run, common: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("explain", "--prompt", "Blessed are the meek", "--html", "-", *common)
    assert done.code == 0
    assert done.out.startswith("<!doctype html>")
    assert "helped most" in done.err
    assert not Path("-").exists()


def test_a_file_that_takes_no_more_is_named(run: Run, common: list[object]) -> None:
    done = run("explain", "--prompt", "Blessed", "--html", "/dev/full", *common)
    assert done.code == 1
    assert "No space left on device: '/dev/full'" in done.err


def test_without_snippets_nothing_of_the_text_is_kept(
    run: Run, common: list[object], held_out: Path, tmp_path: Path, model: Path, name: str
) -> None:
    other = [each if each != name else f"{name}-bare" for each in common]
    text = tmp_path / FILE_NAME
    assert (
        run("build", "--reference", text, "--general-windows", 0, "--no-snippets", *other).code == 0
    )
    assert run("learn", held_out, "--no-snippets", *other).code == 0
    done = run("explain", "--text", held_out, "--json", "-", *other)
    found = json.loads(done.out)
    assert found["cases"]
    assert {case["snippet"] for case in found["cases"]} == {""}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["explain"], "--text, --prompt: got neither of them, expected one"),
        (["explain", "--prompt", "a", "--text", "TEXT"], "got both of them"),
        (["explain", "--prompt", "x"], "none with 2 tokens"),
        (["explain", "--prompt", "xy", "--html", "/nowhere/x.html"], "--html: got /nowhere/x.html"),
        (["explain", "--prompt", "xy", "--html", "-", "--json", "-"], "--html: got - twice"),
        (["evaluate", "--text", "TEXT", "--per-token", "x.csv"], "--per-token: got x.csv"),
        (["evaluate", "--text", "TEXT", "--per-document", "/nowhere/x.jsonl"], "--per-document"),
    ],
)
def test_what_is_refused(
    run: Run, common: list[object], held_out: Path, arguments: list[str], says: str
) -> None:
    done = run(*(held_out if each == "TEXT" else each for each in arguments), *common)
    assert done.code == 2
    assert says in done.err
