"""Runners that fail, and what is shown of a phase; never a timing."""

from __future__ import annotations

from multiprocessing.connection import Connection

import numpy as np
import pytest

from benchmarks.clustered import Workload, make_workload
from benchmarks.load import RunnerFailed, received, runners
from benchmarks.stall import FollowingRouter, Seen

WORKLOAD = make_workload(100, 8, 8, 8, 4, 0)


def gives_up(target: str, workload: Workload, orders: Connection) -> None:
    """A runner that is ready, and then refuses."""
    orders.send("ready")
    orders.recv()
    raise ValueError(f"{target} has {len(workload.ids)} keys too many")


def test_a_runner_that_fails_ends_the_phase_with_its_own_words() -> None:
    with runners(1, gives_up, "nowhere", WORKLOAD) as [end]:
        router = FollowingRouter(end)
        router.start()
        with pytest.raises(RunnerFailed, match=r"gives_up: ValueError: nowhere has 100 keys too"):
            router.stop()
        with pytest.raises(RunnerFailed, match="ended"):
            received(end)


def test_a_hiccup_is_beyond_the_p99_of_idle_lookups() -> None:
    idle = Seen([1.0] * 98 + [2.0] * 2)
    row = Seen([1.0, 2.5, 3.5, 60.0], errors=1).row(idle)
    assert (row["lookups"], row["errors"], row["hiccups"]) == (4, 1, 2)
    assert (row["p50_ms"], row["max_ms"], row["over_client_deadline"]) == (3.0, 60.0, 1)
    assert np.isclose(row["p99_ms"], np.quantile([1.0, 2.5, 3.5, 60.0], 0.99), atol=1e-3)
