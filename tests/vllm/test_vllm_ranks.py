"""Two ranks of a tensor-parallel group, in processes of their own: they route alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.sidecar import Sidecar
from tests.vllm.ask import apart
from tests.vllm.models import Checkpoint, Text, fill, prompts, with_memory, written

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")

TOLERANCE = 2e-5
TEXTS = prompts(4)
PROGRAM = """
import json, sys
from dataclasses import asdict
from tests.vllm.ask import ask, engine
if __name__ == "__main__":
    given = json.load(sys.stdin)
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with engine(given["model"], given["knn_moe"], **options) as llm:
        memories = {"plain": None, "law": "law", "mixed": ["law", None, "law", None]}
        answers = {name: ask(llm, given["texts"], asked) for name, asked in memories.items()}
        status = llm.collective_rpc("knn_moe_status")
    answers = {name: [asdict(text) for text in texts] for name, texts in answers.items()}
    print("ANSWER " + json.dumps({"answers": answers, "status": status}))
"""


@pytest.mark.parametrize("retrieval", ["replica", "remote"])
def test_two_ranks_route_alike(
    retrieval: str, tmp_path: Path, checkpoint: Callable[[str], Checkpoint], sidecar: Sidecar
) -> None:
    model = checkpoint("qwen3_moe")
    if retrieval == "replica":
        fill(sidecar, "law", model, prompts(8, seed=1) + TEXTS[:2])
    config = {
        "target": sidecar.target,
        "memories": ["law"],
        "retrieval": retrieval,
        "timeout_s": 20,
    }
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    given = {"model": str(model.path), "knn_moe": config, "texts": TEXTS}
    done = subprocess.run(
        [sys.executable, str(program)],
        input=json.dumps(given),
        env=os.environ
        | {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert lines, done.stderr[-3000:]
    found = json.loads(lines[0].removeprefix("ANSWER "))
    answers = {k: [Text(**text) for text in v] for k, v in found["answers"].items()}
    plain, remembered = written(model, TEXTS), with_memory(model, sidecar.target, "law", TEXTS)
    assert apart(answers["plain"], plain) < TOLERANCE
    assert apart(answers["law"], remembered) < TOLERANCE
    mixed = [remembered[0], plain[1], remembered[2], plain[3]]
    assert apart(answers["mixed"], mixed) < TOLERANCE
    first, second = found["status"]
    assert (first["hooked"], second["hooked"]) == (3, 3)
    assert first["memories"]["law"]["fell_back"] == {}
    assert second["memories"] == {}  # one rank asks
