"""Every family's routers are found and understood."""

import sys

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import model_runner.architectures
from model_runner.architectures import find_router_sites
from model_runner.architectures.logit_swap import swapped_logits
from model_runner.errors import BadInput, UnsupportedModel
from model_runner.router_hooks import verify_hooks
from tests.families import FAMILIES, UNSERVED, shared_model, tiny_model

MINIMUM_SERVED = 54


def test_public_names() -> None:
    assert model_runner.architectures.__all__ == [
        "Assignment",
        "Family",
        "RouterOutput",
        "RouterSite",
        "find_router_sites",
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_see_every_layer_and_change_nothing(family: str, dtype: torch.dtype) -> None:
    verify_hooks(shared_model(family, dtype))


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_describe_the_router(family: str) -> None:
    model = shared_model(family)
    modules = dict(model.named_modules())
    for layer, site in enumerate(find_router_sites(model)):
        assert site.layer == layer
        assert modules[site.name] is site.router
        assert site.hidden_size == 32
        assert site.top_k == (1 if family == "zaya" else 2)
        widths = {"longcat_flash": (10, 10), "zaya": (8, 9), "inkling_text": (8, 10)}
        assert (site.num_experts, site.num_logits) == widths.get(family, (8, 8))


def test_how_many_families_are_served() -> None:
    served = [family for family in FAMILIES if find_router_sites(shared_model(family))]
    sys.stdout.write(f"\nserved: {len(served)}; not served: {UNSERVED}\n")
    assert len(served) >= MINIMUM_SERVED


@pytest.mark.parametrize("family", UNSERVED)
def test_families_that_cannot_be_served_say_why(family: str) -> None:
    with pytest.raises(UnsupportedModel, match=r"DogeForCausalLM is not served: .*DogeCDMoE"):
        find_router_sites(tiny_model(family, is_moe=True, num_experts=16))


def test_dense_models_are_refused() -> None:
    config = LlamaConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        vocab_size=8,
        pad_token_id=0,
    )
    with pytest.raises(UnsupportedModel, match="LlamaForCausalLM has no MoE layer"):
        find_router_sites(LlamaForCausalLM(config))


class TwoEqualMaps(nn.Module):
    """A router whose inner layer happens to be as wide as its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4, bias=False)
        self.outer = nn.Linear(4, 4, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.outer(self.inner(hidden_states).relu())


def test_only_the_last_map_of_that_width_is_replaced() -> None:
    router = TwoEqualMaps()
    seen: list[torch.Tensor] = []
    with swapped_logits(router, 4, lambda logits: seen.append(logits) or logits + 1):
        output = router(torch.ones(3, 4))
    assert len(seen) == 1
    torch.testing.assert_close(output, router(torch.ones(3, 4)) + 1)


def test_a_router_without_such_a_map_is_refused() -> None:
    with (
        pytest.raises(UnsupportedModel, match="no linear map of width 5"),
        swapped_logits(TwoEqualMaps(), 5, lambda logits: logits),
    ):
        TwoEqualMaps()(torch.ones(3, 4))


def test_logits_of_another_shape_are_refused() -> None:
    router = TwoEqualMaps()
    with (
        pytest.raises(BadInput, match="must be \\(3, 4\\)"),
        swapped_logits(router, 4, lambda z: z[:1]),
    ):
        router(torch.ones(3, 4))


def test_matmul_routers_are_tapped_too() -> None:
    weight = torch.randn(4, 2)
    with swapped_logits(nn.Identity(), 2, torch.zeros_like):
        logits = torch.mm(torch.ones(3, 4), weight)
    assert not logits.any()
