"""The stream of learning online: what comes in, its thirds, its results."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from knnmoe.client import ExampleRef

from benchmarks.prequential import Stream, StreamSettings, draw_stream, results_of, third
from model_runner.scoring import Scores
from tests.tiny_checkpoint import byte_tokenizer


def scores_of(nll_sums: list[float]) -> Scores:
    """Ten tokens per example."""
    examples = tuple(ExampleRef("f", str(number)) for number in range(len(nll_sums)))
    return Scores(np.array(nll_sums), np.full(len(nll_sums), 10.0), examples)


def test_thirds_are_in_order_and_hold_every_example() -> None:
    scores = scores_of([float(number) for number in range(8)])
    parts = [third(scores, number).nll_sums.tolist() for number in range(3)]
    assert parts == [[0.0, 1.0], [2.0, 3.0, 4.0], [5.0, 6.0, 7.0]]


def test_results_are_changes_against_the_plain_model() -> None:
    plain, routed = scores_of([50.0] * 6), scores_of([50.0, 50.0, 45.0, 45.0, 40.0, 40.0])
    settings = StreamSettings(examples=6)
    results = json.loads(json.dumps(results_of(Stream(plain, routed, 60, 1.23), settings)))
    assert [part["delta"] for part in results["thirds"]] == pytest.approx([0.0, -0.5, -1.0])
    assert [part["windows"] for part in results["thirds"]] == [2, 2, 2]
    assert results["all"]["delta"] == pytest.approx(-0.5)
    assert not any(math.isnan(part["se"]) for part in results["thirds"])
    assert (results["entries"], results["elapsed_s"]) == (60, 1.2)
    assert results["settings"]["preset"] == "recommended"


def test_the_stream_has_one_full_window_of_each_chapter_in_an_order_of_the_seed() -> None:
    one, same, other = (
        draw_stream(byte_tokenizer(), StreamSettings(seed=seed, examples=20)) for seed in (1, 1, 2)
    )
    assert one == same != other
    assert len({window.ref for window in one}) == 20
    assert {len(window.token_ids) for window in one} == {128}
