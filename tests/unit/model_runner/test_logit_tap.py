"""Logits are replaced inside the routers; the family's own code does the rest."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from model_runner.architectures import RouterSite, find_router_sites
from model_runner.errors import BadInput, HooksInUse
from model_runner.logit_tap import LogitTap, family_assignment, wrapped_forward
from model_runner.router_hooks import Logits, RouterCall, RouterHooks
from tests.families import FAMILIES, prompt, shared_model, tiny_model

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def unchanged(site: RouterSite, logits: Tensor) -> Tensor:
    return logits


def doubled(site: RouterSite, logits: Tensor) -> Tensor:
    return 2 * logits


@torch.no_grad()
def run(model: nn.Module) -> Tensor:
    return model(input_ids=prompt()).logits


@DTYPES
@pytest.mark.parametrize("family", FAMILIES)
def test_a_tap_that_changes_nothing_is_bit_exact(family: str, dtype: torch.dtype) -> None:
    model = shared_model(family, dtype)
    plain = run(model)
    with LogitTap(model, unchanged):
        assert torch.equal(run(model), plain)
    with LogitTap(model, lambda site, logits: logits.double().neg()):  # the dtype is cast back
        assert not torch.equal(run(model), plain)
    assert torch.equal(run(model), plain)


@DTYPES
@pytest.mark.parametrize("family", FAMILIES)
def test_family_assignment_of_own_logits_is_the_models(family: str, dtype: torch.dtype) -> None:
    model = shared_model(family, dtype)
    arguments: dict[int, tuple[tuple[object, ...], dict[str, object]]] = {}
    calls: list[RouterCall] = []
    with RouterHooks(model, lambda call: calls.append(call)) as hooks:
        handles = [
            site.router.register_forward_hook(
                lambda _m, args, kwargs, _o, layer=site.layer: arguments.update(
                    {layer: (args, kwargs)}
                ),
                with_kwargs=True,
            )
            for site in hooks.sites
        ]
        run(model)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        for call in calls:
            own = family_assignment(call.site, call.router_logits, *arguments[call.site.layer])
            assert torch.equal(own.weights, call.weights)
            assert torch.equal(own.experts, call.experts)
            assert own.experts.dtype == torch.int64


def test_the_hidden_states_of_the_arguments_do_not_matter() -> None:
    site = find_router_sites(shared_model("olmoe"))[0]
    logits = torch.randn(5, 8)
    one = family_assignment(site, logits, (torch.zeros(5, 32),))
    other = family_assignment(site, logits.double(), (), {"hidden_states": torch.ones(5, 32)})
    assert torch.equal(one.weights, other.weights)
    assert torch.equal(one.experts, logits.topk(2).indices)


def test_other_shapes_are_refused() -> None:
    site = find_router_sites(shared_model("olmoe"))[0]
    with pytest.raises(BadInput, match=r"\(5, 8\)"):
        family_assignment(site, torch.zeros(4, 8), (torch.zeros(5, 32),))


def test_gradients_flow_through_the_tap() -> None:
    model = shared_model("olmoe")
    deltas: list[Tensor] = []

    def shifted(site: RouterSite, logits: Tensor) -> Tensor:
        deltas.append(torch.zeros_like(logits, requires_grad=True))
        return logits + deltas[-1]

    with LogitTap(model, shifted):
        loss = model(input_ids=prompt()).logits.square().sum()
    gradients = torch.autograd.grad(loss, deltas)
    assert len(gradients) == 4
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_taps_nest_inner_first() -> None:
    model = shared_model("olmoe")
    seen: list[tuple[str, Tensor]] = []

    def outer(site: RouterSite, logits: Tensor) -> Tensor:
        seen.append(("outer", logits))
        return logits

    def inner(site: RouterSite, logits: Tensor) -> Tensor:
        seen.append(("inner", logits))
        return logits + 1

    sites = find_router_sites(model)[:1]
    with LogitTap(model, outer, sites), LogitTap(model, inner, sites):
        run(model)
    assert [name for name, _ in seen] == ["inner", "outer"]
    assert torch.equal(seen[1][1], seen[0][1] + 1)


def test_a_tap_is_entered_once() -> None:
    tap = LogitTap(shared_model("olmoe"), unchanged)
    with tap, pytest.raises(HooksInUse), tap:
        pass


def test_forward_is_restored_after_an_exception() -> None:
    model = tiny_model("olmoe")
    router = find_router_sites(model)[0].router
    offloading = router.forward  # as accelerate leaves it: an attribute of the instance
    router.forward = offloading

    def broken(site: RouterSite, logits: Tensor) -> Tensor:
        raise LookupError

    with pytest.raises(LookupError), LogitTap(model, broken):
        run(model)
    assert vars(router)["forward"] is offloading
    assert "forward" not in vars(find_router_sites(model)[1].router)


def test_wrapped_forward_keeps_the_signature() -> None:
    linear = nn.Linear(2, 2)
    with wrapped_forward(linear, lambda forward: forward):
        assert vars(linear)["forward"] == linear.forward
    assert "forward" not in vars(linear)


def test_a_tap_within_hooks_sees_what_the_policy_chose() -> None:
    model = shared_model("olmoe")
    seen: list[Tensor] = []

    def keep(site: RouterSite, logits: Tensor) -> Tensor:
        seen.append(logits)
        return logits

    sites = find_router_sites(model)[:1]
    with (
        RouterHooks(model, lambda call: Logits(call.router_logits + 1)),
        LogitTap(model, keep, sites),
    ):
        run(model)
    own, chosen = seen
    assert torch.equal(chosen, own + 1)


def test_one_thread_at_a_time_taps_a_model() -> None:
    """Two would see each other's forward passes, and the first to leave would put the other's back."""
    model = shared_model("olmoe")

    def other(tap: LogitTap) -> None:
        with tap:
            pass

    with ThreadPoolExecutor(1) as pool:
        with LogitTap(model, unchanged), LogitTap(model, unchanged):
            refused = pool.submit(other, LogitTap(model, unchanged))
            with pytest.raises(HooksInUse, match="another thread taps this model's routers"):
                refused.result()
            pool.submit(other, LogitTap(shared_model("mixtral"), unchanged)).result()
        pool.submit(other, LogitTap(model, unchanged)).result()
