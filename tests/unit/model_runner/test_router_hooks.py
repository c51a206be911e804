"""Policies see and replace assignments; everything is put back afterwards."""

from collections.abc import Callable

import accelerate
import pytest
import torch
from torch import Tensor, nn

from model_runner.architectures import find_router_sites
from model_runner.errors import BadInput, HookBypassed, HooksInUse, UnsupportedModel
from model_runner.router_hooks import (
    Assignment,
    Logits,
    Policy,
    RouterCall,
    RouterHooks,
    verify_hooks,
)
from tests.families import (
    CORE_FAMILIES,
    FAMILIES,
    LONGEST_SUM,
    MOST_LAYERS,
    prompt,
    shared_model,
    tiny_model,
)
from tests.rounding import assert_same_sums

ODD_FAMILIES = ("dbrx", "llama4_text", "jetmoe", "gemma4_text", "laguna", "inkling_text", "zaya")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def no_reply(call: RouterCall) -> None:
    return None


def identity(call: RouterCall) -> Assignment:
    return Assignment(call.weights.clone(), call.experts.clone())


def own_logits(call: RouterCall) -> Logits:
    return Logits(call.router_logits.clone())


def three_more_experts(call: RouterCall) -> Assignment:
    """A stand-in for a memory: a function of the router input alone, blended at 0.5."""
    scores = call.router_input.float().cumsum(-1)[:, : call.site.num_experts]
    remembered, experts = scores.topk(3)
    weights = remembered.softmax(-1) * call.weights.float().sum(-1, keepdim=True)
    return Assignment(
        torch.cat([0.5 * call.weights.float(), 0.5 * weights], -1),
        torch.cat([call.experts, experts], -1),
    )


def logit_step(call: RouterCall) -> Logits:
    delta = call.router_input.float()[:, : call.site.num_logits]
    return Logits(call.router_logits.float() + delta)


@torch.no_grad()
def run(model: nn.Module, policy: Policy | None = None, **kwargs: Tensor) -> Tensor:
    kwargs = kwargs or {"input_ids": prompt()}
    if policy is None:
        return model(**kwargs).logits
    with RouterHooks(model, policy) as hooks:
        logits = model(**kwargs).logits
        hooks.assert_complete()
    return logits


def generate(model: nn.Module, policy: Policy | None = None, **kwargs: object) -> Tensor:
    defaults = {
        "inputs": prompt(),
        "attention_mask": torch.ones_like(prompt()),
        "max_new_tokens": 3,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    if policy is None:
        return model.generate(**(defaults | kwargs))
    with RouterHooks(model, policy):
        return model.generate(**(defaults | kwargs))


def footprint(model: nn.Module) -> list[object]:
    """Whatever a hook could leave behind on a module."""
    return [
        (
            name,
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            len(module._forward_hooks_always_called),
            vars(module).get("forward"),
        )
        for name, module in model.named_modules()
    ]


@DTYPES
@pytest.mark.parametrize("family", FAMILIES)
def test_policies_that_change_nothing_are_bit_exact(family: str, dtype: torch.dtype) -> None:
    model = shared_model(family, dtype)
    plain = run(model)
    for policy in (no_reply, identity, own_logits):
        torch.testing.assert_close(run(model, policy), plain, rtol=0, atol=0)


@DTYPES
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_identity_is_the_plain_one(family: str, dtype: torch.dtype) -> None:
    model = shared_model(family, dtype)
    assert torch.equal(generate(model, identity), generate(model))


@DTYPES
@pytest.mark.parametrize("family", FAMILIES)
def test_replies_change_the_output_until_the_context_ends(family: str, dtype: torch.dtype) -> None:
    model = shared_model(family, dtype)
    before, plain = footprint(model), run(model)
    for policy in (three_more_experts, logit_step):
        changed = run(model, policy)
        assert torch.isfinite(changed).all()
        assert not torch.equal(changed, plain)
        assert footprint(model) == before
    assert torch.equal(run(model), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_fewer_experts_than_the_model_uses(family: str) -> None:
    model = shared_model(family)
    changed = run(model, lambda call: Assignment(call.weights[:, :1], call.experts[:, :1]))
    assert torch.isfinite(changed).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exception_in_the_policy_leaves_no_hook(family: str) -> None:
    model = shared_model(family)
    before, plain = footprint(model), run(model)

    def broken(call: RouterCall) -> None:
        raise LookupError("no memory")

    with pytest.raises(LookupError, match="no memory"):
        run(model, broken)
    assert footprint(model) == before
    assert torch.equal(run(model), plain)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "llama4_text", "jetmoe", "dbrx"])
def test_a_repeated_expert_adds_its_weights_up(family: str) -> None:
    model = shared_model(family)

    def halves(call: RouterCall) -> Assignment:
        return Assignment(
            torch.cat([call.weights, call.weights], -1) / 2,
            torch.cat([call.experts, call.experts], -1),
        )

    assert_same_sums(run(model, halves), run(model), length=LONGEST_SUM, layers=MOST_LAYERS)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", CORE_FAMILIES)
def test_every_experts_implementation(family: str, implementation: str) -> None:
    model = tiny_model(family)
    model.set_experts_implementation(implementation)
    plain = run(model)
    for policy in (no_reply, identity, own_logits):
        assert torch.equal(run(model, policy), plain)
    expected = run(shared_model(family), three_more_experts)
    changed = run(model, three_more_experts)
    assert_same_sums(changed, expected, length=LONGEST_SUM, layers=MOST_LAYERS)


def test_what_a_policy_sees() -> None:
    model = shared_model("olmoe")
    calls: list[RouterCall] = []
    run(model, lambda call: calls.append(call))
    assert [call.site.layer for call in calls] == [0, 1, 2, 3]
    for call in calls:
        assert call.router_input.shape == (12, 32)
        weight = call.site.router.weight
        assert torch.equal(nn.functional.linear(call.router_input, weight), call.router_logits)
        assert call.weights.shape == call.experts.shape == (12, 2)
        assert call.experts.dtype == torch.int64
        assert (call.batch_shape, call.valid) == ((2, 6), None)


@pytest.mark.parametrize("family", ODD_FAMILIES)
def test_router_logits_are_the_raw_ones(family: str) -> None:
    """Also where the router returns probabilities, capped logits or only some of them."""
    model = shared_model(family)
    linears: list[Tensor] = []
    real_linear = nn.functional.linear
    calls: list[RouterCall] = []

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func is real_linear:
                linears.append(result)
            return result

    with Spy():
        run(model, lambda call: calls.append(call))
    for call in calls:
        assert call.router_logits.shape == (12, call.site.num_logits)
        same_size = [z for z in linears if z.numel() == call.router_logits.numel()]
        assert any(torch.equal(z.reshape(12, -1), call.router_logits) for z in same_size)


@pytest.mark.parametrize("family", [*CORE_FAMILIES, *ODD_FAMILIES])
def test_left_padding_is_published(family: str) -> None:
    model = shared_model(family)
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[0, :4] = 0
    input_ids = prompt(length=6) * mask
    masks: list[Tensor | None] = []
    inputs: list[Tensor] = []

    def see(call: RouterCall) -> None:
        masks.append(call.valid)
        inputs.append(call.router_input[call.valid])

    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    run(model, see, input_ids=input_ids, attention_mask=mask, position_ids=position_ids)
    for valid in masks:
        assert torch.equal(valid, mask.flatten().bool())
    padded = inputs.copy()
    inputs.clear()

    def see_alone(call: RouterCall) -> None:
        inputs.append(call.router_input)

    run(model, see_alone, input_ids=input_ids[:1, 4:])
    for layer, (with_padding, alone) in enumerate(zip(padded, inputs, strict=True)):
        assert_same_sums(with_padding[:2], alone, length=LONGEST_SUM, layers=layer + 1)


def test_padding_of_cached_steps() -> None:
    model = shared_model("olmoe")
    mask = torch.ones_like(prompt())
    mask[0, :3] = 0
    seen: list[tuple[tuple[int, int] | None, int]] = []

    def see(call: RouterCall) -> None:
        if call.site.layer == 0:
            seen.append((call.batch_shape, int(call.valid.sum())))

    generate(model, see, attention_mask=mask)
    assert seen == [((2, 6), 9), ((2, 1), 2), ((2, 1), 2)]


@pytest.mark.parametrize("policy", [three_more_experts, logit_step])
@pytest.mark.parametrize("family", [*CORE_FAMILIES, *ODD_FAMILIES])
def test_generation_with_and_without_cache_agree(family: str, policy: Policy) -> None:
    model = shared_model(family)
    settings = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
    cached = generate(model, policy, **settings)
    uncached = generate(model, policy, use_cache=False, **settings)
    assert torch.equal(cached.sequences, uncached.sequences)
    one, other = torch.stack(cached.logits), torch.stack(uncached.logits)
    assert_same_sums(one, other, length=LONGEST_SUM, layers=MOST_LAYERS)


def test_a_model_is_hooked_once_at_a_time() -> None:
    model = shared_model("olmoe")
    hooks = RouterHooks(model, identity)
    with hooks:
        with pytest.raises(HooksInUse, match="OlmoeForCausalLM is already hooked"), hooks:
            pass
        with (
            pytest.raises(HooksInUse, match="leave the other"),
            RouterHooks(model.get_decoder(), identity),
        ):
            pass
        assert run_count(hooks, model) == [1, 1, 1, 1]
    with hooks:
        assert run_count(hooks, model) == [1, 1, 1, 1]


def run_count(hooks: RouterHooks, model: nn.Module) -> list[int]:
    model(input_ids=prompt())
    return hooks.hits


def test_two_models_can_be_hooked() -> None:
    with (
        RouterHooks(shared_model("olmoe"), identity),
        RouterHooks(shared_model("mixtral"), identity),
    ):
        pass


def bypass(model: nn.Module) -> None:
    """What a fused kernel does: the block's maths without calling its router module."""
    block = model.model.layers[2].mlp

    def fused(hidden_states: Tensor) -> Tensor:
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, experts = block.gate.forward(flat)
        return block.experts(flat, experts, weights).reshape(hidden_states.shape)

    block.forward = fused


def test_a_bypassed_router_is_named() -> None:
    model = tiny_model("olmoe")
    bypass(model)
    with RouterHooks(model, no_reply) as hooks:
        model(input_ids=prompt())
        with pytest.raises(HookBypassed, match=r"model\.layers\.2\.mlp\.gate") as caught:
            hooks.assert_complete()
    assert caught.value.names == ("model.layers.2.mlp.gate",)
    with pytest.raises(HookBypassed):
        verify_hooks(model)


def test_completeness_is_checked_since_the_last_check() -> None:
    model = shared_model("olmoe")
    with RouterHooks(model, no_reply) as hooks:
        with pytest.raises(HookBypassed, match=r"4 MoE layer\(s\)"):
            hooks.assert_complete()
        model(input_ids=prompt())
        hooks.assert_complete()
        with pytest.raises(HookBypassed):
            hooks.assert_complete()


def test_verification_needs_eval_mode() -> None:
    with pytest.raises(BadInput, match="eval"):
        verify_hooks(tiny_model("olmoe").train())


def test_verification_finds_a_router_that_hides_its_logits() -> None:
    model = tiny_model("olmoe")
    router = model.model.layers[1].mlp.gate
    plain = router.forward

    def returns_probabilities(hidden_states: Tensor) -> tuple[Tensor, ...]:
        logits, weights, experts = plain(hidden_states)
        return logits.softmax(-1), weights, experts

    router.forward = returns_probabilities
    with pytest.raises(UnsupportedModel, match="_CHANGED_LOGITS"):
        verify_hooks(model)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (lambda call: (call.weights, call.experts), "not tuple"),
        (lambda call: Assignment(call.weights[:1], call.experts[:1]), r"12 tokens"),
        (lambda call: Assignment(call.weights[:, :1], call.experts), r"\[12, k\]"),
        (lambda call: Assignment(call.weights, call.experts + 8), "0..7"),
        (lambda call: Assignment(call.weights, call.experts - 8), "0..7"),
        (lambda call: Logits(call.router_logits[:, :4]), r"\(12, 8\)"),
    ],
)
def test_bad_replies(reply: Callable[[RouterCall], object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        run(shared_model("olmoe"), reply)


@pytest.mark.parametrize("family", ["olmoe", "gemma4_text", "inkling_text", "deepseek_v3", "zaya"])
def test_offloaded_weights(family: str) -> None:
    """The routers' weights are on the meta device whenever a hook could look at them."""
    expected = {policy: run(shared_model(family), policy) for policy in (identity, logit_step)}
    model = tiny_model(family)
    accelerate.cpu_offload(model)
    assert all(p.device.type == "meta" for p in find_router_sites(model)[0].router.parameters())
    for policy, logits in expected.items():
        assert torch.equal(run(model, policy), logits)
    verify_hooks(model)
