"""What a curve is judged by, and the soak for some seconds; `make soak SOAK_MINUTES=30` runs it in full."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.congruence.fast_dir import fast_dir
from tests.faults import soak
from tests.faults.curves import Bound, draw, judge, table
from tests.faults.soak_load import TINY

__all__ = ["fast_dir"]

MINUTES = np.linspace(0, 30, 360)
RNG = np.random.default_rng(0)
FLAT = {
    "still": np.full(360, 40.0),
    "warms up": 300 - 100 * np.exp(-MINUTES),
    "saw": 60 + MINUTES % 4 * 10,
    "spikes": 300 + 400 * (RNG.random(360) < 0.1),
    "falls": 300 - 5 * MINUTES,
}
GROWING = {
    "leak": 300 + MINUTES + RNG.normal(0, 3, 360),
    "leak under spikes": 300 + MINUTES + 400 * (RNG.random(360) < 0.1),
    "steps": 300 + 10 * (MINUTES // 5),
}


@pytest.mark.parametrize("name", FLAT)
def test_what_is_flat(name: str) -> None:
    [found] = judge(MINUTES, FLAT, {name: Bound(16, 0.05)})
    assert found.flat, found


@pytest.mark.parametrize("name", GROWING)
def test_what_grows(name: str) -> None:
    [found] = judge(MINUTES, GROWING, {name: Bound(16, 0.05)})
    assert not found.flat, found


def test_what_is_held_to_a_size_may_fill_it() -> None:
    filling = {"log": np.minimum(40 + 5 * MINUTES, 120)}
    [held] = judge(MINUTES, filling, {"log": Bound(cap=128)})
    [over] = judge(MINUTES, filling, {"log": Bound(cap=100)})
    assert (held.flat, over.flat) == (True, False)
    assert "| level 128.0 | held |" in table([held])


def test_too_few_samples() -> None:
    with pytest.raises(ValueError, match="3 samples, expected enough"):
        judge([0, 1, 2], {"x": [1, 1, 1]}, {"x": Bound(1)})


def test_table_and_picture(tmp_path: Path) -> None:
    verdicts = judge(MINUTES, GROWING, {"leak": Bound(16), "steps": Bound(1000)})
    leak, steps = table(verdicts).splitlines()[2:]
    assert "**grows**" in leak
    assert steps.endswith("| flat |")
    draw(list(MINUTES), {n: list(v) for n, v in GROWING.items()}, verdicts, tmp_path / "it.png")
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")


def test_some_seconds_of_it(fast_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(fast_dir))
    out = fast_dir / "out"
    result = soak.run(0.05, 1, out, lambda _: None, size=TINY, sample_every_s=0.1, job_every_s=0.5)
    assert result["problems"] == []
    assert result["done"]["lookups in the replica"] >= 0
    assert all(len(curve) == len(result["at_minute"]) for curve in result["curves"].values())
    assert {each.name for each in out.iterdir()} == {"soak.json", "soak.md", "soak.png"}
