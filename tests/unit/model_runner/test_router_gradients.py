"""Gradients with respect to every router's logits, checked against finite differences."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_runner.architectures import RouterSite
from model_runner.errors import BadInput, HookBypassed, UnsupportedModel
from model_runner.logit_tap import LogitTap, family_assignment
from model_runner.memory_builder.objective import LayerTrace, dense_assignment, router_gradients
from model_runner.router_hooks import Logits, RouterCall, RouterHooks
from tests.families import (
    CORE_FAMILIES,
    FAMILIES,
    LONGEST_SUM,
    MOST_LAYERS,
    prompt,
    shared_model,
    tiny_model,
)
from tests.rounding import assert_same_sums, rounding

# Up through the layers, and down again.
BOTH_WAYS = 2 * MOST_LAYERS


def next_token_loss(input_ids: Tensor) -> Callable[[Tensor], Tensor]:
    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten(), reduction="sum"
        )

    return loss


def gradients(model: nn.Module, **options: object) -> list[LayerTrace]:
    return router_gradients(model, prompt(), next_token_loss(prompt()), **options)


@torch.no_grad()
def loss_with(model: nn.Module, fn: Callable[[RouterSite, Tensor], Tensor]) -> float:
    with LogitTap(model, fn):
        return float(next_token_loss(prompt())(model(input_ids=prompt()).logits).double())


@pytest.mark.parametrize("scope", ["leaf", "live"])
@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "llama4_text"])
def test_finite_differences(family: str, scope: str) -> None:
    model = shared_model(family)
    check_finite_differences(model, gradients(model, scope=scope), scope, logits_per_layer=3)


def check_finite_differences(
    model: nn.Module, traces: list[LayerTrace], scope: str, logits_per_layer: int
) -> None:
    """Central differences at the steepest logits of each layer; no top-k choice flips there."""
    epsilon = 1e-2
    for trace in traces:
        flat = trace.gradient.flatten()
        for position in flat.abs().topk(logits_per_layer).indices.tolist():
            step = torch.zeros_like(flat)
            step[position] = epsilon
            moved = [
                loss_with(model, moving(traces, trace, sign * step, scope)) for sign in (1, -1)
            ]
            numeric = (moved[0] - moved[1]) / (2 * epsilon)
            assert numeric == pytest.approx(flat[position].item(), rel=2e-2, abs=2e-4)


def moving(
    traces: list[LayerTrace], moved: LayerTrace, step: Tensor, scope: str
) -> Callable[[RouterSite, Tensor], Tensor]:
    def fn(site: RouterSite, logits: Tensor) -> Tensor:
        if scope == "leaf":  # the later routers are held at what they saw
            logits = traces[site.layer].router_logits.reshape(logits.shape)
        return logits + step.reshape(logits.shape) if site.layer == moved.site.layer else logits

    return fn


def test_leaf_and_live_differ_except_in_the_last_layer() -> None:
    model = shared_model("olmoe")
    leaf, live = gradients(model, scope="leaf"), gradients(model, scope="live")
    for one, other in zip(leaf, live, strict=True):
        assert torch.equal(one.router_logits, other.router_logits)
        assert torch.equal(one.router_input, other.router_input)
        assert torch.equal(one.gradient, other.gradient) == (one.site.layer == 3)


@pytest.mark.parametrize("straight_through", [False, True], ids=["sparse", "straight-through"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, straight_through: bool) -> None:
    model = shared_model(family)
    plain: list[RouterCall] = []
    with torch.no_grad(), RouterHooks(model, lambda call: plain.append(call)):
        before = model(input_ids=prompt()).logits
    model.requires_grad_(True)
    traces = gradients(model, straight_through=straight_through)
    assert len(traces) == len(plain)
    for trace, call in zip(traces, plain, strict=True):
        assert trace.site == call.site
        assert trace.router_input.shape == (2, 6, 32)
        assert trace.router_logits.shape == trace.gradient.shape == (2, 6, trace.site.num_logits)
        seen = trace.router_logits.flatten(0, 1)
        assert_same_sums(seen, call.router_logits, length=LONGEST_SUM, layers=MOST_LAYERS)
        assert torch.isfinite(trace.gradient).all()
        assert not trace.router_input.requires_grad
        assert not trace.gradient[:, -1].any()
        reached = (trace.gradient[:, :-1] != 0).float().mean()
        if straight_through and family not in INPUT_SCALED:
            assert reached > 0.9
        elif family not in CONSTANT_WEIGHTS:
            assert reached > 0
        check_stored_assignment(trace)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(input_ids=prompt()).logits, before)


def check_stored_assignment(trace: LayerTrace) -> None:
    """A trace holds all that it takes to make the assignment that a memory stores."""
    target = (trace.router_logits - 3 * trace.gradient).flatten(0, 1)
    with torch.no_grad():
        stored = family_assignment(trace.site, target, trace.router_args, trace.router_kwargs)
    assert stored.experts.shape == stored.weights.shape == (12, trace.site.top_k)


# A score of zero makes llama4's expert input zero, where a gated expert's derivative vanishes.
INPUT_SCALED = ("llama4_text",)
# phimoe masks all scores that are not within 2 % of the best: most weights are exactly 1.
CONSTANT_WEIGHTS = ("phimoe",)


@pytest.mark.parametrize("family", CORE_FAMILIES)
def test_straight_through_leaves_the_loss_and_the_chosen_experts_gradient(family: str) -> None:
    model = shared_model(family)
    losses: list[float] = []

    def kept(logits: Tensor) -> Tensor:
        losses.append(float(loss(logits.detach())))
        return loss(logits)

    loss = next_token_loss(prompt())
    sparse = router_gradients(model, prompt(), kept)
    dense = router_gradients(model, prompt(), kept, straight_through=True)
    tolerance = rounding(LONGEST_SUM, losses[0], MOST_LAYERS)
    assert losses[1] == pytest.approx(losses[0], rel=0, abs=tolerance)
    for one, other in zip(sparse, dense, strict=True):
        support = (one.gradient != 0).sum(), (other.gradient != 0).sum()
        assert support[1] >= support[0]


def test_dense_assignment_has_the_sparse_value_and_the_full_gradient() -> None:
    logits = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    probabilities = logits.softmax(-1)
    weights, experts = probabilities.topk(2)
    dense = dense_assignment(weights, experts, probabilities)
    assert torch.equal(dense.experts, torch.arange(8).expand(6, 8))
    sparse = torch.zeros(6, 8, dtype=torch.float64).scatter(1, experts, weights)
    assert torch.equal(dense.weights, sparse)
    value = torch.randn(6, 8, dtype=torch.float64)  # what each expert would contribute
    (gradient,) = torch.autograd.grad((dense.weights * value).sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad((probabilities * value).sum(), logits)
    torch.testing.assert_close(gradient, expected)


def test_straight_through_scores_are_in_the_familys_scale() -> None:
    logits = torch.randn(6, 8, requires_grad=True)
    score = logits.sigmoid()
    chosen = score.topk(2)
    weights = 2.5 * chosen.values / chosen.values.sum(-1, keepdim=True)
    dense = dense_assignment(weights, chosen.indices, score)
    scale = 2.5 / chosen.values.detach().sum(-1)
    unchosen = score.argmin(-1, keepdim=True)
    (gradient,) = torch.autograd.grad(dense.weights.gather(1, unchosen).sum(), logits)
    expected = (score * (1 - score)).gather(1, unchosen).squeeze(1) * scale
    torch.testing.assert_close(gradient.gather(1, unchosen).squeeze(1), expected)


def test_padding_has_no_gradient() -> None:
    model = shared_model("olmoe")
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[0, :3] = 0

    def loss(logits: Tensor) -> Tensor:
        targets = prompt()[:, 1:].masked_fill(mask[:, :-1] == 0, -100)
        return F.cross_entropy(
            logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-100
        )

    for trace in router_gradients(model, prompt(), loss, attention_mask=mask):
        assert not trace.gradient[0, :3].any()
        assert trace.gradient[0, 3:5].any()


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "jetmoe", "zaya"])
def test_detached_keys_and_values_leave_each_tokens_own_loss(family: str) -> None:
    model = shared_model(family)

    def first_token(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, 0], prompt()[:, 1], reduction="sum")

    def last_but_one(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, -2], prompt()[:, -1], reduction="sum")

    crossing = router_gradients(model, prompt(), last_but_one)[0].gradient
    assert crossing[:, 0].any()
    own = router_gradients(model, prompt(), last_but_one, detach_kv=True)
    assert not any(trace.gradient[:, :-2].any() for trace in own)
    assert router_gradients(model, prompt(), first_token, detach_kv=True)[0].gradient[:, 0].any()


def test_models_without_such_projections_say_so() -> None:
    with pytest.raises(UnsupportedModel, match="no K/V projections"):
        gradients(shared_model("dbrx"), detach_kv=True)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", CORE_FAMILIES)
def test_every_experts_implementation(family: str, implementation: str) -> None:
    model = tiny_model(family)
    model.set_experts_implementation(implementation)
    for one, other in zip(gradients(model), gradients(shared_model(family)), strict=True):
        assert_same_sums(one.gradient, other.gradient, length=LONGEST_SUM, layers=BOTH_WAYS)
    assert model.get_experts_implementation()[""] == implementation


@pytest.mark.parametrize("family", ["olmoe", "gemma4_text", "dbrx", "jetmoe", "deepseek_v3"])
def test_within_hooks_the_gradient_is_at_the_policys_logits(family: str) -> None:
    """What boosting needs: the memory is on while the gradient is taken."""
    model = shared_model(family)

    def remembered(call: RouterCall) -> Logits:
        return Logits(call.router_logits.detach() + call.router_input[:, :8].detach())

    with RouterHooks(model, remembered):
        traces = gradients(model)
    check_finite_differences(model, traces, "leaf", logits_per_layer=1)
    assert not torch.equal(traces[0].router_logits, gradients(model)[0].router_logits)


@pytest.mark.parametrize("straight_through", [False, True])
def test_bfloat16_gradients_are_close(straight_through: bool) -> None:
    exact = gradients(shared_model("olmoe"), straight_through=straight_through)
    rounded = gradients(shared_model("olmoe", torch.bfloat16), straight_through=straight_through)
    for one, other in zip(exact, rounded, strict=True):
        assert other.gradient.dtype == torch.bfloat16
        cosine = F.cosine_similarity(one.gradient.flatten(), other.gradient.float().flatten(), 0)
        assert cosine > 0.95


def test_gradient_checkpointing_gives_the_same() -> None:
    model = tiny_model("olmoe")
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    for one, other in zip(gradients(model), expected, strict=True):
        assert_same_sums(one.gradient, other.gradient, length=LONGEST_SUM, layers=BOTH_WAYS)
        assert torch.equal(one.router_logits, other.router_logits)


def test_bad_arguments() -> None:
    model = shared_model("olmoe")
    with pytest.raises(BadInput, match="scope"):
        gradients(model, scope="all")
    with pytest.raises(BadInput, match="scalar"):
        router_gradients(model, prompt(), lambda logits: logits.sum(-1))
    with pytest.raises(BadInput, match="inference_mode"), torch.inference_mode():
        gradients(model)


def test_a_bypassed_router_is_named() -> None:
    model = tiny_model("olmoe")
    model.model.layers[1].mlp.forward = lambda hidden_states: hidden_states
    with pytest.raises(HookBypassed, match=r"model\.layers\.1\.mlp\.gate"):
        gradients(model)


def test_requires_grad_is_restored_after_an_exception() -> None:
    model = tiny_model("olmoe")
    model.lm_head.requires_grad_(False)

    def broken(logits: Tensor) -> Tensor:
        raise LookupError

    with pytest.raises(LookupError):
        router_gradients(model, prompt(), broken)
    assert not model.lm_head.weight.requires_grad
    assert model.model.layers[0].mlp.gate.weight.requires_grad
