"""The route benchmark at toy size: the shape of its results and the accuracy it reports; never a timing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.clustered import make_workload
from benchmarks.exact import Reading, exact_answer, nearest
from benchmarks.report import ratios
from benchmarks.timing import Lane, batches, measure

TOY = ("--keys", "500", "--dimension", "32", "--repeats", "4", "--evict-mib", "1", "--quiet")
TOKENS = (1, 32, 512)
SIDECAR_LANES = {
    ("unary tcp", "f16", 1),
    ("stream tcp", "f16", 1),
    ("stream unix", "f16", 1),
    ("stream unix", "f32", 1),
    ("stream unix", "f16", 32),
}
FAISS_LANES = {
    ("faiss flat", "in-process", 1),
    ("faiss flat", "in-process, 1 thread", 1),
    ("faiss flat", "in-process", 32),
    ("faiss hnsw", "in-process", 1),
    ("faiss hnsw", "in-process, 1 thread", 1),
    ("faiss hnsw", "in-process", 32),
}


def run(json_file: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.route", "--json", str(json_file), *TOY]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("faiss", reason="FAISS comes with the eval extra")
    json_file = tmp_path_factory.mktemp("route") / "made" / "route.json"
    done = run(json_file)
    assert done.returncode == 0, done.stderr
    content: dict[str, Any] = json.loads(json_file.read_text())
    return content


def test_a_row_for_every_engine_transport_and_number_of_tokens(result: dict[str, Any]) -> None:
    rows = result["rows"]
    for tokens in TOKENS:
        mine = [r for r in rows if r["tokens"] == tokens]
        sidecar = [r for r in mine if r["engine"] == "sidecar"]
        assert {(r["transport"], r["dtype"], r["neighbours"]) for r in sidecar} == SIDECAR_LANES
        faiss = [r for r in mine if r["engine"] != "sidecar"]
        assert {(r["engine"], r["transport"], r["neighbours"]) for r in faiss} == FAISS_LANES
    assert [r["n"] for r in rows] == ([4] * 8 + [1] * 16) + ([4] * 3 + [1] * 6)


def test_rows_hold_milliseconds_and_the_stages_of_the_reply(result: dict[str, Any]) -> None:
    for r in result["rows"]:
        assert 0 < r["min_ms"] <= r["p50_ms"] <= r["p99_ms"]
        stages = {"decode", "search", "blend", "encode", "transport"}
        assert set(r["stages_ms"]) == (stages if r["engine"] == "sidecar" else set())


def test_says_what_ran_and_how(result: dict[str, Any]) -> None:
    assert result["machine"]["cpus"] == os.cpu_count()
    assert {"numpy", "faiss-cpu", "qdrant-edge-py"} <= set(result["machine"]["versions"])
    settings = result["settings"]
    assert (settings["keys"], settings["dimension"], settings["quantization"]) == (500, 32, "int8")
    assert (settings["seed"], settings["num_experts"], settings["top_k"]) == (0, 64, 8)
    assert settings["hnsw_ef"] == {"1": 100, "32": 100}


def test_answers_agree_with_brute_force(result: dict[str, Any]) -> None:
    assert result["recall_at_1"] >= 0.99
    assert result["lambda_error_mean"] < 1e-3
    for accuracy in result["accuracy"].values():
        assert accuracy["lambda_error_max_where_found"] < 1e-5
        assert accuracy["logits_error_max_where_found_f32"] < 1e-4
        assert accuracy["logits_error_max_where_found_f16"] < 1e-2
        assert 0.1 < accuracy["lambda_median"] < 0.9  # neither all nor nothing is retrieved


def test_ratios_are_against_both_indexes(result: dict[str, Any]) -> None:
    for name, number in {"ratios": 12, "ratios_of_minima": 12, "ratios_32_neighbours": 6}.items():
        assert {"one_token_vs_faiss_flat", "512_tokens_vs_faiss_flat"} <= set(result[name])
        assert len(result[name]) == number


def test_without_faiss_it_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "faiss.py").write_text("raise ImportError('none here')\n")
    there = os.environ.get("PYTHONPATH", "")
    done = run(tmp_path / "route.json", PYTHONPATH=f"{tmp_path}{os.pathsep}{there}")
    assert done.returncode == 2
    assert "eval extra: pip install 'knn-moe[eval]'" in done.stderr
    assert not (tmp_path / "route.json").exists()


def test_the_workload_depends_on_its_seed_alone() -> None:
    one, same, other = (make_workload(40, 16, 8, 4, 6, seed) for seed in (1, 1, 2))
    assert np.array_equal(one.keys, same.keys)
    assert np.array_equal(one.queries, same.queries)
    assert not np.array_equal(one.keys, other.keys)
    assert [a.dtype.name for a in (one.keys, one.queries, one.ids)] == [
        "float32",
        "float16",
        "uint64",
    ]
    assert len(np.unique(one.ids)) == 40
    assert one.held_out.shape == (4, 16)


def test_brute_force_is_brute_force() -> None:
    workload = make_workload(30, 8, 5, 1, 3, seed=0)
    queries = workload.queries.astype(np.float64)
    squared = ((queries[:, None] - workload.keys) ** 2).sum(axis=2)
    rows, distances = nearest(workload.keys, queries, 30)
    assert np.array_equal(rows, np.argsort(squared, axis=1))
    assert np.allclose(distances, np.sort(squared, axis=1), rtol=1e-12)


def test_the_exact_answer_of_one_neighbour_by_hand() -> None:
    workload = make_workload(1, 4, 1, 1, 2, seed=0)
    answer = exact_answer(workload, 1, Reading(gamma=0.5, step_size=2.0, null_weight=0.25))
    query = workload.queries[0].astype(np.float64)
    s = np.exp(-0.5 * ((query - workload.keys[0]) ** 2).sum())
    assert answer.lambdas[0] == pytest.approx(s / (s + 0.25))
    expected = workload.logits[0] + 2.0 * s * workload.deltas[0] / (s + 0.25)
    assert np.allclose(answer.logits[0], expected, rtol=1e-6)


def test_batches_stay_inside_the_queries_and_move_on() -> None:
    made = batches(queries=10, tokens=4, rounds=5)
    assert all(b.start >= 0 and b.stop <= 10 and b.stop - b.start == 4 for b in made)
    assert made[0] != made[1]
    assert batches(queries=4, tokens=4, rounds=2) == [slice(0, 4)] * 2


def test_every_lane_runs_in_every_round_after_the_caches_are_swept() -> None:
    log: list[str] = []

    def lane(name: str) -> Lane:
        return Lane(name, "none", "f32", 1, lambda tokens: log.append(name))

    samples = measure([lane("a"), lane("b")], [slice(0, 1)] * 3, lambda: log.append("sweep"), 0)
    assert [len(s) for s in samples] == [3, 3]
    assert log[::2] == ["sweep"] * 8
    assert sorted(log[1::2]) == ["a"] * 4 + ["b"] * 4  # one round warms up


def test_a_ratio_below_one_means_that_the_sidecar_is_faster() -> None:
    lanes = [
        ("sidecar", "stream unix", "f16", 1.0),
        ("sidecar", "stream unix", "f32", 9.0),
        *((e, t, "f32", 4.0) for e, t, k in sorted(FAISS_LANES) if k == 1),
    ]
    rows = [
        {"engine": e, "transport": t, "dtype": d, "neighbours": 1, "tokens": 1, "p50_ms": ms}
        for e, t, d, ms in lanes
    ]
    made = ratios(rows, "p50_ms", 1)
    assert set(made.values()) == {0.25}
    assert "one_token_vs_faiss_hnsw_1_thread" in made
