"""An empty memory behind a real service leaves every family as it is, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from knnmoe.client import AdminClient
from torch import Tensor

from model_runner.fingerprint import model_fingerprint
from model_runner.memory_builder.recipes import PRESETS
from model_runner.router_client import OnError, RouterClient
from model_runner.router_hooks import RouterHooks
from model_runner.routing_policy import RetrievalPolicy
from tests.families import FAMILIES, prompt, shared_model
from tests.integration.runner_parts import PRESET_NAMES
from tests.sidecar import Sidecar


def test_the_zoo_is_large() -> None:
    assert len(FAMILIES) >= 54


def outputs(model: Any) -> tuple[Tensor, Tensor]:
    """Logits of a prefill, and those of each step of generate()."""
    with torch.no_grad():
        prefill = model(input_ids=prompt()).logits
        steps = model.generate(
            prompt(),
            attention_mask=torch.ones_like(prompt()),
            max_new_tokens=4,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        ).logits
    return prefill, torch.stack(steps)


@pytest.mark.parametrize("preset", PRESET_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_memory_changes_nothing(
    ram_sidecar: Sidecar, name: str, family: str, dtype: torch.dtype, preset: str
) -> None:
    model = shared_model(family, dtype)
    fingerprint = model_fingerprint(model)
    with AdminClient(ram_sidecar.target) as client:
        client.find_or_create(
            name, fingerprint.message(), PRESETS[preset].settings(fingerprint.num_layers)
        )
    plain = outputs(model)
    with RouterClient(
        ram_sidecar.target, name, fingerprint, on_error=OnError.RAISE, timeout_s=30.0
    ) as router:
        policy = RetrievalPolicy(router)
        with RouterHooks(model, policy) as hooks:
            routed = outputs(model)
            hooks.assert_complete()
    assert all(torch.equal(a, b) for a, b in zip(plain, routed, strict=True))
    assert all(use.tokens == use.abstained > 0 for use in policy.use.values())
