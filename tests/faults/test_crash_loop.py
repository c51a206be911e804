"""A few rounds of the crash loop; `make crash KILLS=200 SEED=0` runs it in full."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.congruence.fast_dir import fast_dir
from tests.faults import crash
from tests.faults.crash_model import Expectation, Fact

__all__ = ["fast_dir"]


def test_nothing_acknowledged_is_lost_and_nothing_deleted_comes_back(fast_dir: Path) -> None:
    result = crash.run(6, 5, 600, fast_dir / "data", lambda _: None)
    assert result["kills"] == 6


OLD, NEW = Fact(1, "a"), Fact(2, "b")


@pytest.mark.parametrize(
    ("found", "broken"),
    [({7: 1}, False), ({7: 2}, False), ({}, True), ({7: 3}, True), ({7: 1, 8: 1}, True)],
)
def test_the_model_allows_the_before_and_the_after_of_what_was_under_way(
    found: dict[int, int], broken: bool
) -> None:
    expected = Expectation([{7: OLD}])
    expected.begin(0, {7: NEW})
    assert bool(expected.settle([found])) is broken


def test_the_model_holds_to_what_was_acknowledged() -> None:
    expected = Expectation([{7: OLD}])
    expected.begin(0, {7: NEW})
    expected.acknowledge(0, {7: NEW})
    assert expected.settle([{7: 1}])
    expected.begin(0, {7: None})
    expected.acknowledge(0, {7: None})
    assert expected.settle([{7: 2}])
    assert not expected.settle([{}])
