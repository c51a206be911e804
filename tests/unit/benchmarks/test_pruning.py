"""Arms, calls, rows, table and picture of benchmarks.pruning."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from knnmoe.client import ExampleRef
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from rich.console import Console

from benchmarks.pruning import Settings, texts_of
from benchmarks.pruning_arms import CURVE, POLICIES, RANDOM, SHARES, Arm, Pruner, Size, arms
from benchmarks.pruning_report import FULL, Row, Trial, gain_kept, plot, rows_of, table_of
from model_runner.scoring import Scores
from router_service.memories.settings import Kind
from router_service.retention.plan import validate
from router_service.rpc.retention import decode_plan
from tests.sidecar import CALL_TIMEOUT_S, LOGIT_DELTA, random_entries, running_sidecar
from tests.tiny_checkpoint import byte_tokenizer

EXAMPLES = tuple(ExampleRef("f", str(number)) for number in range(4))
PLAIN = np.array([50.0, 60.0, 55.0, 45.0])
GAINS = np.array([4.0, 1.0, 3.0, 2.0])


def scores(gain: float, skew: float = 0.0) -> Scores:
    """Ten tokens per example; `gain` of GAINS, `skew` moves it from one example to another."""
    sums = PLAIN - gain * GAINS - skew * np.array([1.0, -1.0, 0.0, 0.0])
    return Scores(sums, np.full(4, 10.0), EXAMPLES)


def rows() -> list[Row]:
    found = [
        Trial(
            policy,
            share,
            gamma,
            Size(int(share * 100), 2**20),
            1.0,
            {d: scores(gain) for d in ("shifted", "in_domain")},
        )
        for policy, share, gamma, gain in (
            (FULL, 1.0, "kept", 1.0),
            (RANDOM, 0.5, "kept", 0.6),
            ("strength", 0.5, "kept", 0.9),
            ("strength", 0.5, "new", 1.1),
        )
    ]
    return rows_of(found, {domain: scores(0.0) for domain in ("shifted", "in_domain")})


@pytest.mark.parametrize("arm", arms(), ids=lambda arm: f"{arm.policy} {arm.share}")
def test_the_service_understands_every_plan(arm: Arm) -> None:
    request = decode_plan(arm.plan())
    assert request.max_share == arm.share
    validate(request.plan, Kind.LOGIT_DELTA)


def test_every_policy_is_tried_at_half_and_some_along_a_curve() -> None:
    tried = {(arm.policy, arm.share) for arm in arms()}
    assert {policy for policy, share in tried if share == 0.5} == set(POLICIES)
    assert all((policy, share) in tried for policy in CURVE for share in SHARES)
    assert [arm.policy for arm in arms() if arm.by_use] == ["use"]
    assert [arm.policy for arm in arms(["gain", RANDOM], [0.75])] == [RANDOM]


def test_a_uniform_loss_keeps_its_share_without_an_error() -> None:
    kept, error = gain_kept(scores(0.8), scores(1.0), scores(0.0))
    assert (kept, error) == (pytest.approx(0.8), pytest.approx(0.0, abs=1e-12))


def test_the_error_of_a_share_is_that_of_a_ratio() -> None:
    kept, error = gain_kept(scores(0.8, skew=0.5), scores(1.0), scores(0.0))
    assert kept == pytest.approx(0.8)
    assert error == pytest.approx(np.sqrt((0.25 + 0.25) * 4 / 3) / GAINS.sum())


def test_rows_compare_with_the_full_memory_and_with_chance() -> None:
    full, at_random, strength, recalibrated = json.loads(json.dumps(rows()))
    assert (full["gain_kept"], full["against_random"]) == (pytest.approx(1.0), None)
    assert at_random["against_random"]["delta"] == 0.0
    assert strength["against_random"]["delta"] == pytest.approx(-0.3 * GAINS.sum() / 40)
    assert recalibrated["against_random"] is None  # nothing random was scored with a new gamma
    assert strength["in_domain_against_full"]["delta"] == pytest.approx(0.1 * GAINS.sum() / 40)
    assert recalibrated["gain_kept"] == pytest.approx(1.1)
    assert (strength["entries"], strength["disk_bytes"]) == (50, 2**20)


def test_the_table_and_the_picture_show_the_rows(tmp_path: Path) -> None:
    out = io.StringIO()
    Console(file=out, width=200).print(table_of(rows()))
    assert all(word in out.getvalue() for word in ("strength", "50%", "90.0% ± 0.0%", "110.0%"))
    plot(rows(), tmp_path / "shares.png")
    assert (tmp_path / "shares.png").stat().st_size > 1000


def test_the_split_says_what_is_scored_and_building_stays_as_it_is() -> None:
    sizes = {"reference_windows": 3, "dev_windows": 4, "shifted_windows": 2, "general_windows": 2}
    (one, test), (same, dev) = (
        texts_of(byte_tokenizer(), Settings(split=split, **sizes)) for split in ("test", "dev")
    )
    assert one == same
    assert dev.shifted == one.dev[:2]
    assert test.shifted == one.shifted
    assert not {w.ref for w in dev.in_domain} & {w.ref for w in test.in_domain}


def test_a_copy_is_pruned_and_gone_afterwards(tmp_path: Path) -> None:
    with running_sidecar(tmp_path) as sidecar:
        sidecar.create("m", kind=LOGIT_DELTA, gamma=[0.05])
        sidecar.upsert("m", 0, random_entries(LOGIT_DELTA, 40))
        with Pruner(sidecar.target, "m", "copy") as pruner:
            for policy in (RANDOM, "near-duplicates, then disagreement"):
                with pruner.copied():
                    pruner.prune(Arm(policy, 0.5))
                    assert pruner.size_of("copy").entries == 20
            assert pruner.size_of("m").entries == 40
        found = sidecar.admin.ListMemories(admin_pb.ListMemoriesRequest(), timeout=CALL_TIMEOUT_S)
        assert [memory.name for memory in found.memories] == ["m"]
