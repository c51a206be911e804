"""A network between a sidecar and a cluster that loses packets, and then parts them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.congruence.fast_dir import fast_dir
from tests.faults.namespaces import obstacle
from tests.faults.network import Plan, delay_and_loss, parted_from_all, run, table

__all__ = ["fast_dir"]


@pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))
def test_a_network_that_loses_and_parts(fast_dir: Path) -> None:
    """`python -m tests.faults.network` has the others, and goes on for longer."""
    plan = Plan(acknowledged=3, lookups=6, fault_s=0.0)
    late, parted = run(plan, (delay_and_loss, parted_from_all), fast_dir, lambda _: None)
    for row in (late, parted):
        assert row["lost"] == row["wrong"] == []
    assert late["packets_delayed"] > 0
    assert late["acknowledged"] > 0
    assert parted["packets_dropped"] > 0
    assert parted["refused"]
    assert set(parted["refused"]) <= {
        f"{kind} {status}"
        for kind in ("lookup", "write")
        for status in ("UNAVAILABLE", "DEADLINE_EXCEEDED")
    }
    assert table([late, parted]).count("\n") == 4
