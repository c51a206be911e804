"""Where a model's routers are: a module `gate` or `router` beside a module `experts`, in the text decoder."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from model_runner.architectures.families import (
    DbrxFamily,
    Family,
    JetMoeFamily,
    LinearRouterFamily,
    Llama4Family,
    LongcatFlashFamily,
    RouterSite,
)
from model_runner.errors import UnsupportedModel

_ROUTER_NAMES = ("gate", "router")
_TOP_K_NAMES = ("top_k", "num_experts_per_tok", "top_k_experts", "moe_top_k", "moe_topk", "moe_k")
# MoE blocks whose experts are no module named `experts`.
_BLOCKS_WITHOUT_EXPERTS_CHILD = frozenset({"JetMoeMoE"})
# Names under which peft keeps the module that it adapts, or trains a copy of.
_KEPT_BY_PEFT = frozenset({"base_layer", "original_module"})
# Routers that return something else than what their last linear map computed: see Family.returns_raw_logits.
_CHANGED_LOGITS = frozenset({"Gemma4TextRouter", "LagunaTopKRouter", "InklingTopkRouter"})
_UNSERVED_BLOCKS = {
    "DogeCDMoE": "doge computes its routing inside DogeCDMoE.forward; no router module to hook",
    "SwitchTransformersSparseMLP": "an encoder-decoder with a one-hot dispatch mask",
    "NllbMoeSparseMLP": "an encoder-decoder with a capacity-limited dispatch mask",
}


def decoder_of(model: nn.Module) -> nn.Module:
    """The text decoder of `model`: without the language head, without any vision tower."""
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    return decoder if isinstance(decoder, nn.Module) else model


def find_router_sites(model: nn.Module) -> tuple[RouterSite, ...]:
    """The routers of the text decoder's MoE layers, in module order, which is execution order.

    A wrapper of peft or torch.compile around the model, or around its parts, is looked through.

    Raises:
        UnsupportedModel: none was found; says why where the family is known. Or an adapter changes a router.

    """
    in_decoder = set(decoder_of(model).modules())
    sites: dict[nn.Module, RouterSite] = {}
    for block_name, block in model.named_modules():
        for leaf, router in _routers_in(block):
            # A compiled block has its router, and so has the block in it.
            if router in in_decoder and router not in sites:
                name = f"{block_name}.{leaf}" if block_name else leaf
                _require_unadapted(name, router)
                sites[router] = _site(len(sites), name, router, block)
    if not sites:
        raise UnsupportedModel(_why_unserved(model))
    return tuple(sites.values())


def _require_unadapted(name: str, router: nn.Module) -> None:
    """Raises UnsupportedModel when peft wraps a router, a part of it, or what it is in: which one acts may change."""
    wrapped = any(
        isinstance(getattr(part, kept, None), nn.Module)
        for part in router.modules()
        for kept in _KEPT_BY_PEFT
    )
    if wrapped or not _KEPT_BY_PEFT.isdisjoint(name.split(".")):
        raise UnsupportedModel(
            f"an adapter changes the router {name}, and a memory is of one model's routers: leave the routers out of "
            "the adapter, or merge it (model.merge_and_unload()) and build a memory for what results"
        )


def _routers_in(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    has_experts = isinstance(getattr(block, "experts", None), nn.Module)
    if has_experts or type(block).__name__ in _BLOCKS_WITHOUT_EXPERTS_CHILD:
        for leaf in _ROUTER_NAMES:
            router = getattr(block, leaf, None)
            if isinstance(router, nn.Module):
                yield leaf, router


def _site(layer: int, name: str, router: nn.Module, block: nn.Module) -> RouterSite:
    experts = getattr(block, "experts", None)
    hidden_size, num_logits = _widths(router)
    top_k = _top_k(router, block)
    return RouterSite(
        layer=layer,
        name=name,
        router=router,
        experts=experts,
        num_experts=_num_experts(router, experts, num_logits),
        num_logits=num_logits,
        top_k=top_k,
        hidden_size=hidden_size,
        logit_map=max(1, _maps_of_width(router, num_logits)),
        family=_family(router, block, top_k),
    )


def _family(router: nn.Module, block: nn.Module, top_k: int) -> Family:
    names = {cls.__name__ for cls in type(router).__mro__}
    if "DbrxRouter" in names:
        return DbrxFamily(block=block)
    if type(router) is nn.Linear:
        return _family_of_linear_router(block)
    if "Llama4Router" in names:
        return Llama4Family(top_k=top_k)
    if "JetMoeTopKGating" in names:
        return JetMoeFamily()
    if "LongcatFlashTopkRouter" in names:
        return LongcatFlashFamily(returns_raw_logits=False)
    return Family(returns_raw_logits=names.isdisjoint(_CHANGED_LOGITS))


def _family_of_linear_router(block: nn.Module) -> Family:
    if hasattr(block, "route_tokens_to_experts"):
        return LinearRouterFamily(block=block)
    raise UnsupportedModel(
        f"{type(block).__name__} is not served: its router gives logits only, and the assignment is made inside its "
        "experts. A newer transformers may have a router to hook (aria: from 5.18)."
    )


def _widths(router: nn.Module) -> tuple[int, int]:
    """(d, num_logits): the router's own weight, or its first and last linear layer."""
    weight = getattr(router, "weight", None)
    if weight is not None and weight.dim() == 2:
        return int(weight.shape[1]), int(weight.shape[0])
    linears = [module for module in router.modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise UnsupportedModel(f"{type(router).__name__} has no linear map to read its widths from")
    return linears[0].in_features, linears[-1].out_features


def _maps_of_width(router: nn.Module, width: int) -> int:
    return sum(weight.dim() == 2 and weight.shape[0] == width for weight in router.parameters())


def _num_experts(router: nn.Module, experts: Any, num_logits: int) -> int:
    # Longcat's experts say how many there are with the zero-computation ones. Elsewhere the
    # router knows better: under expert parallelism `experts.num_experts` is one rank's share.
    for owner, name in (
        (experts, "total_experts"),
        (router, "num_experts"),
        (experts, "num_experts"),
    ):
        count = getattr(owner, name, None)
        if isinstance(count, int):
            return count
    return num_logits


def _top_k(router: nn.Module, block: nn.Module) -> int:
    for owner in (router, block, getattr(router, "config", None), getattr(block, "config", None)):
        for name in _TOP_K_NAMES:
            value = getattr(owner, name, None)
            if isinstance(value, int):
                return value
    raise UnsupportedModel(f"{type(router).__name__} does not say how many experts a token uses")


def _why_unserved(model: nn.Module) -> str:
    class_name = type(model).__name__
    for block in model.modules():
        reason = _UNSERVED_BLOCKS.get(type(block).__name__)
        if reason:
            return f"{class_name} is not served: {reason}."
    return (
        f"{class_name} has no MoE layer: looked for a module `gate` or `router` beside a module "
        "`experts`. Load a Mixture-of-Experts causal LM with transformers 5."
    )
