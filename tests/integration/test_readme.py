"""The README's Python example, as it stands there, in a fresh interpreter."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from knnmoe.client import AdminClient
from knnmoe.v1.memory_admin_pb2 import StatsRequest

from model_runner import load_model
from model_runner.memory_builder.builder import MemoryBuilder, Target
from model_runner.memory_builder.recipes import PRESETS
from model_runner.progress import Progress
from tests.integration.runner_parts import windows_of
from tests.sidecar import CALL_TIMEOUT_S, Sidecar
from tests.tiny_checkpoint import save_checkpoint

README = Path(__file__).parents[2] / "README.md"


def test_the_python_example_works(edge_sidecar: Sidecar, tmp_path: Path, name: str) -> None:
    checkpoint = save_checkpoint(tmp_path / "model")
    loaded, preset = load_model(str(checkpoint)), PRESETS["recommended"]
    with AdminClient(edge_sidecar.target) as admin:
        settings = preset.settings(loaded.fingerprint.num_layers)
        admin.find_or_create(name, loaded.fingerprint.message(), settings)
        builder = MemoryBuilder(loaded.model, loaded.fingerprint, admin)
        builder.build(windows_of(), [Target(name, preset.recipe)], Progress(quiet=True))
    [example] = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    substitutes = {
        '"allenai/OLMoE-1B-7B-0924"': repr(str(checkpoint)),
        '"127.0.0.1:50051"': repr(edge_sidecar.target),
        '"law"': repr(name),
    }
    for written, here in substitutes.items():
        assert example.count(written) == 1
        example = example.replace(written, here)
    # Two places to import from, at most: not a tour of the package.
    assert len(re.findall(r"^(?:from|import) ", example, flags=re.MULTILINE)) <= 2
    done = subprocess.run(
        [sys.executable, "-c", example], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    stats = edge_sidecar.admin.Stats(StatsRequest(memory=name), timeout=CALL_TIMEOUT_S)
    assert sum(layer.tokens for memory in stats.memories for layer in memory.layers) > 0
