from typing import Any

import numpy as np
import pytest

from router_service.dashboard.history import History, quantile_s
from router_service.memories.counters import DURATION_BOUNDS, Durations

SIXTEEN = [0] * len(DURATION_BOUNDS)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_percentiles_are_off_by_their_range_at_most(share: float) -> None:
    seconds = np.random.default_rng(0).lognormal(-7, 1, 5000)
    durations = Durations()
    for each in seconds:
        durations.add(float(each))
    found = quantile_s(durations.counts, DURATION_BOUNDS, share)
    assert found is not None
    assert 1 / 1.42 < found / np.quantile(seconds, share) < 1.42


def test_what_was_not_counted_has_no_percentile() -> None:
    assert quantile_s([0] * (len(DURATION_BOUNDS) + 1), DURATION_BOUNDS, 0.99) is None
    assert quantile_s([*SIXTEEN, 3], DURATION_BOUNDS, 0.99) == DURATION_BOUNDS[-1]


def stats(uptime_s: int, tokens: int = 0, abstained: int = 0, **counted: Any) -> dict[str, Any]:
    layer = {"tokens": tokens, "tokens_abstained": abstained, "hits": 2 * tokens}
    total = {"stage": "total", "counts": [tokens, *SIXTEEN]}
    memory = {"memory": "m", "layers": [layer | {"route_requests": tokens}], "stages": [total]}
    refused = counted.get("refused", {})
    bounds = list(DURATION_BOUNDS)
    memories = [memory] if counted.get("there", True) else []
    return {
        "uptime_s": uptime_s,
        "memories": memories,
        "refused_lookups": refused,
        "duration_bounds_s": bounds,
    }


def test_rates_are_between_samples() -> None:
    history = History()
    history.add(100.0, stats(10, tokens=4, abstained=4))
    history.add(102.0, stats(12, tokens=24, abstained=9, refused={"deadline": 3}))
    history.add(104.0, stats(14, tokens=24, abstained=9, refused={"deadline": 3}))
    [busy, idle] = history.rates("m")
    assert busy["at_unix_ms"] == 102_000
    assert (busy["tokens_per_s"], busy["hits_per_s"], busy["refused_per_s"]) == (10.0, 20.0, 1.5)
    assert (busy["answered"], busy["abstained"]) == (0.75, 0.25)
    assert busy["p99_ms"] <= 1000 * DURATION_BOUNDS[0]
    assert (idle["answered"], idle["p99_ms"], idle["tokens_per_s"]) == (None, None, 0.0)


def test_there_are_no_rates_across_a_restart_or_of_a_memory_that_was_not_there() -> None:
    history = History()
    for at_s, sample in enumerate(
        [stats(10, there=False), stats(11, tokens=5), stats(2, tokens=7), stats(3, tokens=1)]
    ):
        history.add(float(at_s), sample)
    assert history.rates("m") == []
    assert history.rates("other") == []
