"""Every experiment runs on a tiny model, goes on where it was cut off, and the report is a function of the JSON."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from model_runner.errors import BadInput
from model_runner.experiments import registry
from model_runner.experiments.registry import Plan, named, run
from model_runner.experiments.report import rendered, write_report
from model_runner.experiments.results import read_results
from model_runner.experiments.study import Sizes
from model_runner.progress import Progress
from tests.tiny_checkpoint import save_checkpoint

SIZES = Sizes(
    length=40,
    reference=8,
    dev=2,
    test=4,
    general_dev=2,
    general_test=2,
    largest=10,
    questions=4,
    prompts=2,
    batch_size=8,
)
WORDS = ("brook", "hart ", "water", "soul;", "wheel\n", "thou ", "12 ", "mill-stone ")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains and general text."""
    directory = tmp_path_factory.mktemp("texts")
    for name in ("hymns", "logs", "general"):
        for split in ("reference", "dev", "test"):
            draw = random.Random(f"{name} {split}")
            rows = [
                {"text": "".join(draw.choice(WORDS) for _ in range(40)), "id": f"{split} {n}"}
                for n in range(6)
            ]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (directory / f"{name}_{split}.jsonl").write_text(lines)
    return directory


@pytest.fixture(scope="module")
def plan(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """All experiments on one domain; of arms two, for the others have tests of their own."""
    model = save_checkpoint(tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=2)
    out = tmp_path_factory.mktemp("results")
    parts = ("paper", "recommended")
    return Plan(named("all"), str(model), ["hymns"], [3], out, texts, SIZES, parts=parts)


@pytest.fixture(scope="module")
def finished(plan: Plan) -> Plan:
    """All of it was run."""
    run(plan, Progress(quiet=True))
    return plan


def test_each_experiment_stores_rows(finished: Plan) -> None:
    results = read_results(finished.out)
    assert {r.experiment for r in results} == {each.name for each in finished.chosen}
    assert all(r.rows for r in results)
    assert {(r.model, r.domain, r.seed) for r in results} == {("tiny", "hymns", 3)}


def test_gates_look_up_the_share_that_they_were_set_to(finished: Plan) -> None:
    [result] = [r for r in read_results(finished.out) if r.experiment == "selective"]
    for row in result.rows:
        first_too = (
            row["signal"] == "first layer's lambda"
        )  # of two layers, the first always looks up
        share = (1 + row["rate"]) / 2 if first_too else row["rate"]
        assert row["domain_looked_up"] == pytest.approx(share, abs=0.2)


def test_what_is_there_is_not_run_again(finished: Plan) -> None:
    assert run(finished, Progress(quiet=True)) == 0


def test_goes_on_where_it_was_cut_off(
    finished: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = replace(finished, chosen=named("main"), out=tmp_path)
    written = registry.write_result

    def cut_off(*arguments: object) -> None:
        written(*arguments)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(registry, "write_result", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run(again, Progress(quiet=True))
    monkeypatch.undo()
    assert run(again, Progress(quiet=True)) == len(again.parts) - 1


def test_the_report_is_the_same_byte_for_byte(finished: Plan) -> None:
    page = finished.out / "results.md"
    text = write_report(finished.out, page, finished.out).read_text()
    assert rendered(finished.out, page, finished.out) == text
    assert all(f"model-runner experiment {each.name} " in text for each in finished.chosen)
    shown = re.findall(r"!\[.*\]\((.*)\)", text)
    assert len(shown) >= 4
    assert all((finished.out / name).is_file() for name in shown)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"domains": ["psalms"]}, "psalms_reference.jsonl is not there; domains here: hymns, logs"),
        ({"parts": ["papr"]}, "part 'papr': expected one of"),
    ],
)
def test_bad_input_is_named(
    plan: Plan, tmp_path: Path, change: dict[str, list[str]], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        run(replace(plan, out=tmp_path, **change), Progress(quiet=True))  # type: ignore[arg-type]


def test_unknown_experiment_is_named() -> None:
    with pytest.raises(BadInput, match="experiment 'sise': expected all, report, main, size"):
        named("sise")
