"""README.md and docs/sizes.md hold what benchmarks.sizes prints; its arithmetic by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import sizes
from benchmarks.scaling_grid import placed

ROOT = Path(__file__).parents[3]
ROWS = [
    {"examples": 200, "disk_bytes": 100, "sidecar_bytes": 1000, "build_s": 20},
    {"examples": 1000, "disk_bytes": 500, "sidecar_bytes": 1400, "build_s": 60},
]


@pytest.mark.parametrize("page", ["README.md", "docs/sizes.md"])
def test_pages_hold_what_the_program_prints(page: str) -> None:
    for grid in sizes.grids():
        said = "run `python -m benchmarks.sizes --page README.md docs/sizes.md`"
        assert placed(grid) in (ROOT / page).read_text(), said


def test_every_model_has_every_size_and_says_how_it_is_known() -> None:
    [grid] = sizes.grids()
    known = [row[""] for row in grid.records()]
    assert known == ["measured", "bytes measured", *["computed"] * 7]


def test_what_was_not_measured_is_on_the_line_through_what_was() -> None:
    rows = [*ROWS, {"examples": 600, "disk_bytes": 7, "sidecar_bytes": 8, "build_s": None}]
    assert sizes.small(rows, 200).how == "measured"
    found = sizes.small(rows, 1800)
    assert (found.how, found.disk, found.sidecar, found.build_s) == ("computed", 900, 1800, 100)
    found = sizes.small(rows, 600)
    assert (found.how, found.disk, found.sidecar, found.build_s) == ("bytes measured", 7, 8, 40)


def test_seconds_of_a_token_and_a_parameter() -> None:
    shape = {"layers": 2, "hidden": 10, "experts": 4, "top_k": 2, "intermediate": 5}
    prefill = {
        "settings": shape | {"vocabulary": 100},
        "rows": [
            {"pass": "decode x1", "arm": "plain", "tokens": 1, "p50_ms": 9},
            {"pass": "prefill x1", "arm": "plain", "tokens": 512, "p50_ms": 512},
        ],
    }
    # Attention 4 d², the experts of a token, the router; embedding.
    active = 2 * (4 * 10 * 10 + 2 * 3 * 5 * 10 + 10 * 4) + 100 * 10
    assert sizes.token_s(prefill) == pytest.approx(0.001 / active)


@pytest.mark.parametrize(
    ("seconds", "said"), [(26, "26 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h")]
)
def test_durations_for_readers(seconds: float, said: str) -> None:
    assert sizes.duration(seconds) == said
