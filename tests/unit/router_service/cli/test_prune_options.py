"""Flags of prune mean what their help says; what they cannot mean is refused with the flag's name."""

from __future__ import annotations

import time

import pytest
from knnmoe.v1 import retention_pb2 as pb

from router_service.cli.errors import BadInput
from router_service.cli.retention_commands import RankingName, filters, moment, size


def test_filters() -> None:
    assert filters(None) == []
    named = filters(["kjv", "kjv/3", "a/b/c"])
    assert [(one.source, one.example) for one in named] == [("kjv", ""), ("kjv", "3"), ("a", "b/c")]
    assert [one.HasField("example") for one in named] == [False, True, True]


@pytest.mark.parametrize("text", ["", "/", "/x", "kjv/"])
def test_filters_that_name_nothing(text: str) -> None:
    with pytest.raises(BadInput, match=r"--forget: got .*, expected SOURCE or SOURCE/EXAMPLE"):
        filters([text])


@pytest.mark.parametrize(
    ("text", "unix_ms"),
    [
        ("2026-01-31", 1_769_817_600_000),
        ("2026-01-31T12:00", 1_769_860_800_000),
        ("2026-01-31T12:00:00+01:00", 1_769_857_200_000),
        ("2026-01-31T12:00:00Z", 1_769_860_800_000),
    ],
)
def test_times(text: str, unix_ms: int) -> None:
    assert moment("--older-than", text) == unix_ms


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("2m", 120), ("12h", 43_200), ("30d", 2_592_000), ("1.5w", 907_200), ("0s", 0)],
)
def test_ages(text: str, seconds: float) -> None:
    before = time.time()
    found = moment("--older-than", text)
    assert found is not None
    assert (before - seconds) * 1000 - 1 <= found <= (time.time() - seconds) * 1000
    assert moment("--older-than", None) is None


@pytest.mark.parametrize(
    "text", ["", "soon", "30", "-3d", "d", "30 d", "2026-13-01", "999999999w", "1960-01-01", "nan"]
)
def test_times_that_are_none(text: str) -> None:
    with pytest.raises(BadInput, match="--spare-newer-than: got "):
        moment("--spare-newer-than", text)


def test_sizes() -> None:
    assert size(None) == (None, None)
    assert size("5000") == (5000, None)
    assert size("50%") == (None, 0.5)
    assert size("0.5%") == (None, 0.005)
    assert size("100%") == (None, 1.0)


@pytest.mark.parametrize("text", ["", "0", "-1", "0%", "101%", "x", "5 000", "1e3", "%", "9" * 30])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(BadInput, match="--max-entries: got "):
        size(text)


def test_every_ranking_has_a_name() -> None:
    assert {name.wire_name for name in RankingName} == set(pb.PruneRanking.keys()[1:])
