"""Policies see and replace assignments; everything is put back afterwards."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

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


@pytest.mark.parametrize("family", ["olmoe", "gemma4_text"])  # with and without raw logits
def test_a_pause_has_the_plain_model_to_itself(family: str) -> None:
    model, started = shared_model(family), threading.Event()
    plain, routed, before = run(model), run(model, logit_step), footprint(model)
    found: list[Tensor] = []

    def work() -> None:
        started.set()
        found.append(model(input_ids=prompt()).logits.detach())

    with RouterHooks(model, logit_step) as hooks:
        with hooks.paused():
            other = threading.Thread(target=work)
            other.start()
            started.wait()
            assert torch.equal(run(model), plain)
            assert torch.equal(run(model, logit_step), routed)
            assert hooks.hits == [0] * len(hooks.sites)
        other.join()
        assert hooks.hits == [1] * len(hooks.sites)
    assert torch.equal(found[0], routed)
    assert footprint(model) == before
    with pytest.raises(HooksInUse, match="not entered"), hooks.paused():
        pass


def test_a_pause_waits_for_what_has_begun() -> None:
    model, inside, go_on = shared_model("olmoe"), threading.Event(), threading.Event()
    order: list[str] = []

    def slow(call: RouterCall) -> None:
        inside.set()
        go_on.wait()
        order.append("looked up")

    def pause() -> None:
        with hooks.paused():
            order.append("paused")

    with RouterHooks(model, slow) as hooks:
        threads = [threading.Thread(target=run, args=(model,)), threading.Thread(target=pause)]
        threads[0].start()
        inside.wait()
        threads[1].start()
        go_on.set()
        for thread in threads:
            thread.join()
    assert order == ["looked up"] * len(hooks.sites) + ["paused"]


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
    ("poisoned", "culprit"),
    [
        (
            "lm_head.weight",
            r"first in lm_head; NaN is in its weights lm_head\.weight: load a checkpoint",
        ),
        (
            "model.layers.2.mlp.gate.weight",
            r"first in model\.layers\.2\.mlp\.gate; NaN is in its weights model\.layers\.2\.mlp\.gate\.weight: ",
        ),
    ],
)
def test_verification_names_nan(poisoned: str, culprit: str) -> None:
    """NaN is equal to nothing, not to itself: it looks as if the hooks had changed it."""
    model = tiny_model("olmoe")
    with torch.no_grad():
        model.get_parameter(poisoned)[1] = torch.nan
    before = footprint(model)
    with pytest.raises(
        UnsupportedModel, match="the model gives NaN for a few token ids, " + culprit
    ):
        verify_hooks(model)
    assert footprint(model) == before


def test_verification_names_an_overflow() -> None:
    model = tiny_model("olmoe")
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight.mul_(1e38)
        model.model.layers[1].post_attention_layernorm.weight.mul_(1e38)
    with pytest.raises(UnsupportedModel, match=r"its weights hold no NaN: try another dtype"):
        verify_hooks(model)


THREADS = 8


def masked(row: int, padding: int, left: bool) -> dict[str, Tensor]:
    """A batch of 2 x 6; `padding` tokens of one row are none."""
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[row, :padding] = 0
    mask = mask if left else mask.flip(1)
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    return {
        "input_ids": prompt(length=6) * mask,
        "attention_mask": mask,
        "position_ids": position_ids,
    }


def by_what_is_seen(call: RouterCall) -> Logits:
    """Another reply for other padding, shapes and raw logits: whoever sees another thread's gives another."""
    assert call.batch_shape is not None
    assert call.valid is not None
    bias = call.router_logits.float() * call.valid.float().mean() * call.batch_shape[1] / 9
    return Logits(bias.where(call.valid[:, None], 0.0))


@pytest.mark.parametrize("family", ["olmoe", *ODD_FAMILIES])
def test_threads_see_their_own_forward_pass(family: str) -> None:
    """At every router all threads have passed it before one goes on."""
    model = shared_model(family)
    batches = [masked(n % 2, n % 5, left=n < THREADS // 2) for n in range(THREADS)]
    alone = [run(model, by_what_is_seen, **batch) for batch in batches]
    together = threading.Barrier(THREADS)

    def policy(call: RouterCall) -> Logits:
        together.wait(60)
        reply = by_what_is_seen(call)
        together.wait(60)
        return reply

    @torch.no_grad()
    def forward(batch: dict[str, Tensor]) -> Tensor:
        logits = model(**batch).logits
        hooks.assert_complete()
        return logits

    with RouterHooks(model, policy) as hooks, ThreadPoolExecutor(THREADS) as pool:
        at_once = list(pool.map(forward, batches))
        hooks.assert_complete()
    assert hooks.hits == [THREADS] * len(hooks.sites)
    for one, other in zip(at_once, alone, strict=True):
        assert torch.equal(one, other)


def test_a_bypass_in_one_thread_is_not_hidden_by_another() -> None:
    model = tiny_model("olmoe")
    with RouterHooks(model, no_reply) as hooks, ThreadPoolExecutor(1) as pool:
        pool.submit(run_count, hooks, model).result()
        bypass(model)
        model(input_ids=prompt())
        with pytest.raises(HookBypassed, match=r"model\.layers\.2\.mlp\.gate"):
            hooks.assert_complete()
        pool.submit(hooks.assert_complete).result()


def test_leaving_while_a_thread_runs() -> None:
    """Part of that pass had no policy: its logits are nobody's."""
    model = shared_model("olmoe")
    before, plain = footprint(model), run(model)
    within, left = threading.Event(), threading.Event()

    def policy(call: RouterCall) -> Assignment:
        within.set()
        left.wait(60)
        return identity(call)

    with ThreadPoolExecutor(1) as pool:
        with RouterHooks(model, policy):
            running = pool.submit(model, input_ids=prompt())
            within.wait(60)
        assert footprint(model) == before
        left.set()
        with pytest.raises(HooksInUse, match="left while this forward pass ran"):
            running.result()
    assert torch.equal(run(model), plain)


def test_of_many_threads_one_hooks_the_model() -> None:
    model, together = shared_model("olmoe"), threading.Barrier(THREADS)

    def enter(hooks: RouterHooks) -> bool:
        together.wait(60)
        try:
            hooks.__enter__()
        except HooksInUse:
            return False
        return True

    every = [RouterHooks(model, no_reply) for _ in range(THREADS)]
    before = footprint(model)
    with ThreadPoolExecutor(THREADS) as pool:
        entered = list(pool.map(enter, every))
    for hooks in every:
        hooks.__exit__()
    assert entered.count(True) == 1
    assert footprint(model) == before


@pytest.mark.parametrize(("family", "layers"), [("olmoe", 1), ("dbrx", 1), ("laguna", 2)])
def test_a_compiled_model_sees_padding_and_raw_logits(family: str, layers: int) -> None:
    """The compiler loses what is written to a thread's state, so the hooks are left out of what it compiles."""
    model = tiny_model(family, num_hidden_layers=layers, n_layers=layers)
    batch = masked(0, 2, left=True)
    expected = run(model, by_what_is_seen, **batch)
    with torch.no_grad(), RouterHooks(model, by_what_is_seen) as hooks:
        logits = torch.compile(model, backend="eager")(**batch).logits
        hooks.assert_complete()
    torch._dynamo.reset()
    assert torch.equal(logits, expected)


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
