"""The arithmetic of experiments: calibration, McNemar's test, codes, choices of windows, neighbours, claims."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from knnmoe.client import ExampleRef

from model_runner.errors import BadInput
from model_runner.experiments.arms import preset_setting
from model_runner.experiments.behaviour import expected_calibration_error, repetition
from model_runner.experiments.choice import CHOICES, mcnemar, questions
from model_runner.experiments.claims import CLAIMS
from model_runner.experiments.local import squared_distances
from model_runner.experiments.memories import CODECS
from model_runner.experiments.references import CHOICES as COMPOSITIONS
from model_runner.experiments.references import Pool
from model_runner.experiments.results import Result, read_result, rounded, write_result
from model_runner.experiments.sweeps import sizes_to
from model_runner.memory_builder.recipes import PRESETS
from model_runner.texts import Window


def test_calibration_error_of_known_confidences() -> None:
    # Bins 13 and 3 of 15: 0.9 is right half of the time, 0.2 is always.
    confidence = torch.tensor([0.9, 0.9, 0.2, 0.2])
    correct = torch.tensor([1.0, 0.0, 1.0, 1.0])
    error = expected_calibration_error(confidence, correct)
    assert error == pytest.approx((0.8 + 1.6) / 4, abs=1e-6)


@pytest.mark.parametrize(("gained", "lost", "p"), [(0, 0, 1.0), (5, 0, 0.0625), (7, 3, 0.34375)])
def test_mcnemar_is_the_exact_binomial(gained: int, lost: int, p: float) -> None:
    before = np.array([False] * gained + [True] * lost + [True, False])
    after = np.array([True] * gained + [False] * lost + [True, False])
    assert mcnemar(before, after) == (gained, lost, pytest.approx(p))


def test_questions_have_distinct_continuations_of_one_context() -> None:
    draw = np.random.default_rng(0)
    windows = [
        Window(ExampleRef("f", str(n)), tuple(draw.integers(0, 99, 32).tolist()), (1,), 0)
        for n in range(6)
    ]
    for window, asked in zip(windows, questions(windows, 0), strict=True):
        assert asked[0].token_ids == window.token_ids
        assert len({each.token_ids for each in asked}) == CHOICES
        assert {each.token_ids[:24] for each in asked} == {window.token_ids[:24]}


def test_repetition_counts_what_came_before_and_what_is_known() -> None:
    text = [1, 2, 3, 4, 1, 2, 3, 4, 9, 9]
    found = repetition([text], {tuple(text[:8])})
    assert found == {"repeated": pytest.approx(1 / 7), "copied": pytest.approx(1 / 3)}


def test_codes_of_fewer_bits_are_farther_from_the_keys() -> None:
    keys = torch.randn(400, 16, generator=torch.Generator().manual_seed(0))
    errors = [
        float((CODECS[name].fitted(keys)(keys) - keys).norm())
        for name in ("f32", "f16", "int8", "int4", "int2", "1 bit")
    ]
    assert errors[0] == 0
    assert errors == sorted(errors)


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_compositions_choose_so_many_windows_once(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    refs = [ExampleRef("f", str(n // 3)) for n in range(30)]
    inputs = torch.nn.functional.normalize(torch.randn(30, 8, generator=generator), dim=1)
    pool = Pool(
        [Window(ref, (1, 2), (1,), 0) for ref in refs],
        torch.rand(30, generator=generator),
        inputs,
    )
    chosen = COMPOSITIONS[name](pool, 10, 1)
    assert len(set(chosen)) == 10
    if name == "hardest":
        assert float(pool.loss[chosen].min()) >= float(pool.loss.sort().values[-10])


def test_neighbours_of_an_excluded_owner_are_not_found() -> None:
    keys = torch.eye(4)
    owners = torch.tensor([0, 0, 1, 1])
    distances, rows = squared_distances(
        keys[:1], keys, keys.square().sum(1), 2, (owners, torch.tensor([0]))
    )
    assert set(rows.flatten().tolist()) == {2, 3}
    assert distances.flatten().tolist() == pytest.approx([2.0, 2.0])


def test_sizes_double_up_to_the_full_set() -> None:
    assert sizes_to(2000) == [20, 60, 120, 240, 480, 960, 1920, 2000]
    assert sizes_to(96) == [20, 60, 96]


@pytest.mark.parametrize("name", PRESETS)
def test_settings_are_those_of_the_presets(name: str) -> None:
    setting, preset = preset_setting(name), PRESETS[name]
    assert (setting.recipe, setting.lambda0) == (preset.recipe, preset.lambda0)


def test_results_are_read_as_written(tmp_path: Path) -> None:
    rows = [{"arm": "paper", "delta": -0.123456789, "low": math.nan}]
    result = Result("main", "m", "d", 0, "paper", "command", {"test": 4}, 1.5, rows)
    path = write_result(tmp_path, result)
    assert path == tmp_path / "main" / "m-d-seed0-paper.json"
    assert read_result(path).rows == [{"arm": "paper", "delta": -0.123457, "low": None}]
    assert rounded(math.inf) is None


@pytest.mark.parametrize("content", ["", "[]", '{"schema": 0}', '{"schema": 1, "rows": []}'])
def test_a_file_that_holds_no_result_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(BadInput, match=r"bad\.json"):
        read_result(path)


def test_claims_are_read_off_rows() -> None:
    def row(arm: str, gain: float, harm: float) -> dict[str, object]:
        return {
            "arm": arm,
            "domain": {"delta": -gain, "low": -gain - 0.01, "high": -gain + 0.01},
            "general": {"delta": harm},
        }

    rows = [row("paper", 0.1, 0.05), row("paper-v2", 0.12, 0.06), row("recommended", 0.3, 0.004)]
    rows.append(row("distilled", 0.27, 0.02))
    results = [Result("main", "m", "d", 0, r["arm"], "", {}, 0.0, [r]) for r in rows]  # type: ignore[arg-type]
    found = {
        claim.statement: claim.verdicts(results) for claim in CLAIMS if claim.experiment == "main"
    }
    [twice] = found["`recommended` gains at least twice what the better reading does"]
    assert (twice.holds, twice.text) == (True, "2.5x")
    [harm] = found["The first reading harms general text by at most 0.008"]
    assert not harm.holds
    assert found["`boosted` gains"] == []
    [distilled] = found["Networks distilled from the deltas gain at least as much as `recommended`"]
    assert (distilled.holds, distilled.text) == (False, "0.9x")


@pytest.mark.parametrize(("both", "holds"), [(0.5, True), (0.41, False)])
def test_votes_add_when_the_difference_is_more_than_chance(both: float, holds: bool) -> None:
    def row(method: str, gain: float, **columns: object) -> dict[str, object]:
        change = {"delta": -gain, "se": 0.01, "low": -gain, "high": -gain}
        return {"method": method, "domain": change, "general": change, **columns}

    rows = [row("memory", 0.4), row("memory", 0.4, chosen=True), row("both", both, chosen=True)]
    result = Result("together", "m", "d", 0, "", "", {}, 0.0, rows)  # type: ignore[arg-type]
    [claim] = [claim for claim in CLAIMS if claim.experiment == "together"]
    [verdict] = claim.verdicts([result])
    assert verdict.holds is holds
