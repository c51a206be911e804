"""Families with different routers against a real service: neither side refuses what the other says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from knnmoe.client import AdminClient, ExampleRef
from knnmoe.v1.types_pb2 import MemorySettings
from torch import Tensor, nn

from model_runner.fingerprint import model_fingerprint
from model_runner.memory_builder.builder import MemoryBuilder, Target
from model_runner.memory_builder.recipes import PAPER_V2, PRESETS, Direction
from model_runner.router_client import OnError, RouterClient
from model_runner.router_hooks import RouterHooks
from model_runner.routing_policy import RetrievalPolicy
from model_runner.texts import Window
from tests.families import CORE_FAMILIES, prompt, shared_model
from tests.integration.runner_parts import PRESET_NAMES, QUIET
from tests.sidecar import Sidecar

ODD_FAMILIES = ("dbrx", "gemma4_text", "inkling_text", "jetmoe", "llama4_text", "zaya")
WINDOWS = [
    Window(ExampleRef("s", str(row)), tuple(ids), tuple(range(1, len(ids))), 0)
    for row, ids in enumerate(prompt().tolist())
]


@torch.no_grad()
def run(model: nn.Module, target: str, memory: str) -> Tensor:
    with (
        RouterClient(
            target, memory, model_fingerprint(model), on_error=OnError.RAISE, timeout_s=30.0
        ) as client,
        RouterHooks(model, RetrievalPolicy(client)) as hooks,
    ):
        logits = model(input_ids=prompt()).logits
        hooks.assert_complete()
    return logits


FAMILIES = pytest.mark.parametrize("family", [*CORE_FAMILIES, *ODD_FAMILIES])


@pytest.mark.parametrize("preset", PRESET_NAMES)
@FAMILIES
def test_empty_then_built(ram_sidecar: Sidecar, name: str, family: str, preset: str) -> None:
    model = shared_model(family, torch.bfloat16)
    fingerprint = model_fingerprint(model)
    with torch.no_grad():
        plain = model(input_ids=prompt()).logits
    with AdminClient(ram_sidecar.target) as client:
        client.find_or_create(
            name, fingerprint.message(), PRESETS[preset].settings(fingerprint.num_layers)
        )
        assert torch.equal(run(model, ram_sidecar.target, name), plain)
        builder = MemoryBuilder(model, fingerprint, client)
        builder.build(WINDOWS, [Target(name, PRESETS[preset].recipe)], QUIET)
        client.calibrate(name, 0.5)
    routed = run(model, ram_sidecar.target, name)
    assert torch.isfinite(routed).all()
    assert not torch.equal(routed, plain)


@FAMILIES
def test_stored_logits_without_a_step_are_the_own_ones(
    ram_sidecar: Sidecar, name: str, family: str
) -> None:
    """What is stored and what is blended with it is the same point of the family's code."""
    model, unchanged = shared_model(family), replace(PAPER_V2, direction=Direction.NONE)
    fingerprint = model_fingerprint(model)
    with torch.no_grad():
        plain = model(input_ids=prompt()).logits
    with AdminClient(ram_sidecar.target) as client:
        settings = PRESETS["paper-v2"].settings(fingerprint.num_layers)
        client.find_or_create(name, fingerprint.message(), settings)
        client.update_settings(name, MemorySettings(gamma=[1e-9]))  # lambda is near 1
        MemoryBuilder(model, fingerprint, client).build(WINDOWS, [Target(name, unchanged)], QUIET)
    routed = run(model, ram_sidecar.target, name)
    stored = slice(None, -1)  # all tokens but each window's last
    torch.testing.assert_close(routed[:, stored], plain[:, stored], rtol=0, atol=1e-5)
    assert not torch.equal(routed[:, -1], plain[:, -1])
