"""The README's picture shows the stored results of the demo, on one scale, under names that readers know."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from docs.generate_images import PICTURE, arms
from model_runner.evaluation.demo import ARM_LABELS, METHODS, deltas_digest, plot_deltas, table_rows
from model_runner.memory_builder.recipes import CONTROLS


def _shows(picture: Path) -> str:
    with Image.open(picture) as image:
        return str(image.info["Description"])


def test_the_picture_is_that_of_the_stored_results() -> None:
    assert _shows(PICTURE) == deltas_digest(arms()), "run `python docs/generate_images.py`"


def test_a_picture_says_what_it_was_drawn_from(tmp_path: Path) -> None:
    changed = [dict(arm, delta=arm["delta"] + 0.01) for arm in arms()]
    plot_deltas(changed, tmp_path / "changed.png")
    assert _shows(tmp_path / "changed.png") == deltas_digest(changed) != deltas_digest(arms())


def test_every_arm_has_a_name_for_readers() -> None:
    assert set(ARM_LABELS) == {"zero_shot", *METHODS, *CONTROLS, "oracle"}
    shown = {row[0] for row in table_rows({"arms": arms()})}
    assert shown == set(ARM_LABELS.values())
    assert {"paper (kNN-MoE)", "recommended"} < shown
