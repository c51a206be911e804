"""What an arm adds, from made-up times, and the program on a toy model; never a timing."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks.end_to_end import (
    OLD_PLAIN,
    PLAIN,
    Arm,
    Bench,
    plot,
    ratios_of,
    replica_arms,
    rows_of,
    run,
    table,
    take_turns,
)
from benchmarks.olmoe import DECODED, Pass, Passes, Shape, make_entries, make_model
from model_runner.progress import Progress

DECODE, PREFILL = Pass("decode", 1, 16), Pass("prefill", 2, 16)
QUIET = Progress(quiet=True)
MS = 1_000_000


def made_up(name: str, ms: float, layers: int = 0, beside: str = PLAIN) -> Arm:
    return Arm(name, lambda what, number: [round(ms * MS)] * (1 + number), layers, beside)


def test_what_is_added_is_paired_with_the_arm_beside() -> None:
    arms = [made_up(PLAIN, 10), made_up("slow", 12, 2)]
    arms += [made_up(OLD_PLAIN, 20, 0, OLD_PLAIN), made_up("old: slow", 30, -1, OLD_PLAIN)]
    rows = rows_of(arms, take_turns(arms, [(DECODE, 2)], 0, QUIET), layers=4)
    assert {row["arm"]: (row["ratio"], row["added_ms_per_layer"], row["n"]) for row in rows} == {
        PLAIN: (1.0, 0.0, 5),  # 2 and 3 of the two rounds that count
        "slow": (1.2, 1.0, 5),
        OLD_PLAIN: (1.0, 0.0, 5),
        "old: slow": (1.5, 2.5, 5),
    }
    assert ratios_of(rows) == {"decode x1: slow": 1.2, "decode x1: old: slow": 1.5}


def test_every_arm_has_its_turn_on_the_same_tokens() -> None:
    seen: list[tuple[str, int]] = []

    def arm(name: str) -> Arm:
        def run(what: Pass, number: int) -> list[int]:
            seen.append((name, number))
            return [1]

        return Arm(name, run)

    take_turns([arm("a"), arm("b")], [(DECODE, 2)], 0, QUIET)
    assert [number for _, number in seen] == [0, 0, 1, 1, 2, 2]
    assert all({name for name, _ in seen[at : at + 2]} == {"a", "b"} for at in (0, 2, 4))


def test_the_toy_model_decodes_the_same_tokens_again() -> None:
    shape = Shape.tiny(2)
    passes = Passes(make_model(shape), shape)
    seen: list[torch.Tensor] = []

    def look(call: object) -> None:
        seen.append(call.router_input.clone())  # type: ignore[attr-defined]

    for _ in range(2):
        assert len(passes.run(DECODE, 1, look)) == DECODED
    first, again = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert len(passes.run(PREFILL, 1, None)) == 1


def test_keys_are_kept_from_one_run_to_the_next(tmp_path: Path) -> None:
    shape = Shape.tiny(2, keys=60)
    model = make_model(shape)
    made, kept = (make_entries(model, shape, tmp_path) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(made.keys, kept.keys, strict=True))
    assert [tuple(keys.shape) for keys in made.keys] == [(60, 64), (60, 64)]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_replica_of_the_last_quarter_speaks_for_that_alone(tmp_path: Path) -> None:
    shape = Shape.tiny(4, keys=60)
    model = make_model(shape)
    entries = make_entries(model, shape, tmp_path)
    bench = Bench(model, shape, entries, Passes(model, shape), tmp_path, QUIET)
    layers = {arm.name: arm.layers for arm in replica_arms(bench)}
    assert layers["replica, K = 1, last quarter"] == 1
    assert layers["replica, K = 1"] == 4


def test_all_arms_of_a_toy_model(tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="FAISS comes with the eval extra")
    plan = [(DECODE, 1), (PREFILL, 1)]
    made = run(Shape.tiny(2, keys=300), plan, tmp_path, QUIET)
    names = {row["arm"] for row in made["rows"]}
    assert {
        PLAIN,
        "hook",
        "remote unix, K = 32",
        "remote tcp, K = 1",
        "faiss ivfpq, K = 1",
    } <= names
    assert set(made["ratios"]) == {
        f"{what.name}: {name}" for what, _ in plan for name in names - {PLAIN}
    }
    out = io.StringIO()
    Console(file=out, width=150).print(table(made["rows"]))
    assert all(name in out.getvalue() for name in names)
    plot(made["rows"]).savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000
