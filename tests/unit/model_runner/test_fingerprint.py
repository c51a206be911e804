"""A model is recognised by its routers, whatever its dtype, wrapper or device."""

import re

import accelerate
import pytest
import torch
from knnmoe.fingerprint import ModelFingerprint

from model_runner.errors import UnsupportedModel
from model_runner.fingerprint import model_fingerprint
from tests.families import FAMILIES, FAMILIES_HERE, shared_model, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_and_bf16_loads_agree(family: str) -> None:
    one = model_fingerprint(shared_model(family))
    assert one == model_fingerprint(shared_model(family, torch.bfloat16))
    assert one.architecture == family
    assert re.fullmatch("[0-9a-f]{64}", one.router_hash)
    assert re.fullmatch("[0-9a-f]{16}", one.digest())


def test_no_two_families_share_a_digest() -> None:
    digests = {model_fingerprint(shared_model(family)).digest() for family in FAMILIES_HERE}
    assert len(digests) == len(FAMILIES_HERE)


def test_fields_of_a_known_model() -> None:
    one = model_fingerprint(shared_model("zaya"))
    assert (one.num_layers, one.hidden_size, one.num_experts, one.top_k) == (4, 32, 9, 1)


def test_digest_is_of_the_canonical_json() -> None:
    """Pinned: the service stores it, so a change would orphan every memory."""
    one = ModelFingerprint("olmoe", 16, 2048, 64, 8, "ab" * 32)
    assert one.digest() == "6e51840701c62b99"


def test_language_head_and_prefix_do_not_matter() -> None:
    model = shared_model("olmoe")
    assert model_fingerprint(model) == model_fingerprint(model.get_decoder())


def test_other_weights_do_not_matter_but_the_routers_do() -> None:
    model = tiny_model("olmoe")
    before = model_fingerprint(model)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
        assert model_fingerprint(model) == before
        model.model.layers[3].mlp.gate.weight[0, 0] += 0.5
    after = model_fingerprint(model)
    assert after.router_hash != before.router_hash
    assert after.digest() != before.digest()


def test_swapped_layers_are_noticed() -> None:
    model = tiny_model("olmoe")
    before = model_fingerprint(model)
    layers = model.model.layers
    layers[0].mlp.gate, layers[1].mlp.gate = layers[1].mlp.gate, layers[0].mlp.gate
    assert model_fingerprint(model) != before


@pytest.mark.parametrize("family", ["olmoe", "gemma4_text", "deepseek_v4"])
def test_offloaded_weights_are_brought_in(family: str) -> None:
    model = tiny_model(family)
    before = model_fingerprint(model)
    accelerate.cpu_offload(model)
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    assert model_fingerprint(model) == before
    assert all(parameter.device.type == "meta" for parameter in model.parameters())


def test_absent_weights_are_a_clear_error() -> None:
    model = tiny_model("olmoe").to("meta")
    with pytest.raises(UnsupportedModel, match="meta device; load the model's weights"):
        model_fingerprint(model)
