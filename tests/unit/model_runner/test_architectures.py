"""Every family's routers are found and understood."""

import sys
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import model_runner.architectures
from model_runner.architectures import Assignment, Family, RouterSite, find_router_sites
from model_runner.architectures.families import swapped_logits
from model_runner.errors import BadInput, UnsupportedModel
from model_runner.router_hooks import verify_hooks
from tests.families import FAMILIES, FAMILIES_HERE, UNSERVED, shared_model, tiny_model

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
    served = [family for family in FAMILIES_HERE if find_router_sites(shared_model(family))]
    sys.stdout.write(f"\nserved: {len(served)}; not served: {UNSERVED}\n")
    assert len(served) == len(FAMILIES_HERE)
    assert len(FAMILIES) >= MINIMUM_SERVED


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


def test_an_assignment_inside_the_experts_is_refused() -> None:
    """aria before transformers 5.18"""
    block = nn.ModuleDict({"router": nn.Linear(4, 4), "experts": Experts()})
    block.top_k = 2
    with pytest.raises(UnsupportedModel, match=r"^ModuleDict is not served: its router gives lo"):
        find_router_sites(block)


class LinearRouterBlock(nn.Module):
    """As jamba's before transformers 5.21."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k = 2
        self.router = nn.Linear(4, 4, bias=False)
        self.experts = Experts()

    def route_tokens_to_experts(
        self, hidden_states: torch.Tensor, router_logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weights, experts = router_logits.softmax(-1).topk(self.top_k, dim=-1)
        return experts, weights.to(hidden_states.dtype)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        assigned = self.route_tokens_to_experts(hidden_states, self.router(hidden_states))
        return self.experts(hidden_states, *assigned)


@torch.no_grad()
def test_a_block_that_assigns_what_a_linear_router_gives() -> None:
    block, hidden_states, given = LinearRouterBlock(), torch.randn(3, 4), torch.randn(3, 4)
    (site,) = find_router_sites(block)
    call = (hidden_states,), {}

    def other_logits(*call_and_output: Any) -> Any:
        logits, weights, experts = site.family.read(call_and_output[2])
        assert torch.equal(logits, hidden_states @ block.router.weight.T)
        assert torch.equal(weights, logits.softmax(-1).gather(1, experts))
        return site.family.reassign(site, given, *call)

    handles = site.family.attach(site, other_logits)
    found = block(hidden_states)
    for handle in handles:
        handle.remove()
    assigned = block.route_tokens_to_experts(hidden_states, given)
    assert torch.equal(found, block.experts(hidden_states, *assigned))


def test_experts_may_come_before_weights_and_logits() -> None:
    """granitemoe and aria before transformers 5.21"""
    logits, weights, experts = torch.randn(3, 4), torch.rand(3, 2), torch.ones(3, 2).long()
    read = Family().read((experts, weights, logits, "more"))
    assert read == (logits, weights, experts)
    other = Assignment(weights + 1, experts + 1)
    assert Family().write((experts, weights, logits, "more"), other) == (
        other.experts,
        other.weights,
        logits,
        "more",
    )


class TwoEqualMaps(nn.Module):
    """A router whose inner layer happens to be as wide as its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k = 1
        self.inner = nn.Linear(4, 4, bias=False)
        self.outer = nn.Linear(4, 4, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.outer(self.inner(hidden_states).relu())


@pytest.fixture
def two_maps() -> RouterSite:
    (site,) = find_router_sites(nn.ModuleDict({"gate": TwoEqualMaps(), "experts": Experts()}))
    return site


class Experts(nn.Module):
    num_experts = 4

    def forward(
        self, hidden_states: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        return hidden_states * (experts * weights).sum(-1, keepdim=True)


def test_only_the_last_map_of_that_width_is_replaced(two_maps: RouterSite) -> None:
    hidden_states = torch.ones(3, 4)
    seen: list[torch.Tensor] = []

    def swap(logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits)
        return logits + 1

    with swapped_logits(two_maps, swap):
        output = two_maps.router(hidden_states)
    assert len(seen) == 1
    torch.testing.assert_close(output, two_maps.router(hidden_states) + 1)


def test_logits_that_are_given_are_not_computed(two_maps: RouterSite) -> None:
    hidden_states, given = torch.ones(3, 4), torch.arange(12.0).view(3, 4)
    with torch.no_grad():
        last = [p for p in two_maps.router.parameters() if p.dim() == 2][-1]
        before, last[:] = last.clone(), torch.nan  # of no use, and not looked at
        with swapped_logits(two_maps, given):
            assert torch.equal(two_maps.router(hidden_states), given)
        last[:] = before
    with (
        pytest.raises(BadInput, match=r"gate must be \(3, 4\), got \(1, 4\)"),
        swapped_logits(two_maps, given[:1]),
    ):
        two_maps.router(hidden_states)


def test_a_router_that_computes_no_such_map_is_refused(two_maps: RouterSite) -> None:
    with (
        pytest.raises(UnsupportedModel, match="gate computed no linear map of width 4"),
        swapped_logits(two_maps, lambda logits: logits),
    ):
        two_maps.router.inner(torch.ones(3, 4))


def test_logits_of_another_shape_are_refused(two_maps: RouterSite) -> None:
    with (
        pytest.raises(BadInput, match=r"gate must be \(3, 4\)"),
        swapped_logits(two_maps, lambda logits: logits[:1]),
    ):
        two_maps.router(torch.ones(3, 4))


def test_logits_made_by_matmul_are_replaced_too() -> None:
    site = find_router_sites(shared_model("kolibri1"))[0]
    with swapped_logits(site, torch.zeros_like):
        logits = torch.mm(torch.ones(3, 32), torch.randn(32, 8))
    assert not logits.any()


def test_routers_of_compiled_blocks_are_found_once() -> None:
    model = tiny_model("olmoe")
    names = [site.name for site in find_router_sites(model)]
    for layer in model.model.layers:
        layer.mlp = torch.compile(layer.mlp)
    assert [site.name for site in find_router_sites(model)] == names
    assert [site.name for site in find_router_sites(torch.compile(model))] == [
        f"_orig_mod.{name}" for name in names
    ]
