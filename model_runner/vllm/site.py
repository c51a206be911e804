"""One MoE layer of a model in vLLM, and the hook that puts the operation of a lookup before its kernel.

vLLM runs every family's experts through MoERunner: with router logits that the block made, or with the gate inside of
it. The hook stands before the runner, after the gate (which it then calls itself), so that a memory acts on logits
before every kernel. Nothing of vLLM's classes is changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from model_runner.errors import UnsupportedModel
from model_runner.vllm import op

_FIRST = ("hidden_states", "router_logits")  # of a runner's arguments
_GATES = ("gate", "router")
# Softmax over the k largest logits, said in either order.
_EXACT_IN_LOGITS = (RoutingMethodType.Renormalize, RoutingMethodType.RenormalizeNaive)


@dataclass(frozen=True, slots=True)
class Site:
    """As architectures.families.RouterSite, in vLLM.

    Attributes:
        layer: 0..L-1 over the MoE layers, in module order, which is execution order.
        name: dotted path of the runner below the model.
        router: the gate, a linear map [N, d]; it is the same on every rank.
        inside: whether the runner held it.
        num_experts: N, the width of the logits.
        hidden_size: d, the width of the router input.

    """

    layer: int
    name: str
    runner: nn.Module = field(repr=False)
    router: nn.Module = field(repr=False)
    inside: bool
    num_experts: int
    hidden_size: int

    @property
    def top_k(self) -> int:
        """Experts per token of the model's own routing."""
        return int(self._moe.experts_per_token)

    @property
    def logits_say_assignments(self) -> bool:
        """Whether any assignment whose weights sum to 1 is the routing of some logits: see logit_space."""
        router, runner = self._router, self.runner
        scales = [getattr(owner, "routed_scaling_factor", 1.0) for owner in (router, runner)]
        return (
            self._moe.routing_method in _EXACT_IN_LOGITS
            and getattr(router, "custom_routing_function", None) is None
            and scales == [1.0, 1.0]
        )

    def hook(self) -> None:
        """Puts the operation before the runner, for good."""
        if self.inside:
            self.runner.gate = None  # type: ignore[assignment]
        self.runner.register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(
        self, _runner: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden_states, logits, *rest = (*args, *(kwargs[name] for name in _FIRST[len(args) :]))
        if self.inside:
            logits, _ = self.router(hidden_states)
        op.route(hidden_states, logits, self.layer)
        others = {name: value for name, value in kwargs.items() if name not in _FIRST}
        return (hidden_states, logits, *rest), others

    @property
    def _moe(self) -> Any:
        return self.runner.moe_config

    @property
    def _router(self) -> Any:
        return self.runner.router


def find_sites(model: nn.Module) -> tuple[Site, ...]:
    """The MoE layers of a model whose weights are loaded and not yet packed. Raises UnsupportedModel, naming why."""
    modules = dict(model.named_modules())
    runners = [(name, module) for name, module in modules.items() if isinstance(module, MoERunner)]
    if not runners:
        raise UnsupportedModel(
            f"{type(model).__name__} has no MoE layer of vLLM: serve a Mixture-of-Experts model"
        )
    return tuple(
        _site(layer, name, runner, modules.get(name.rpartition(".")[0], model))
        for layer, (name, runner) in enumerate(runners)
    )


def _site(layer: int, name: str, runner: Any, block: nn.Module) -> Site:
    gates = [runner.gate, *(getattr(block, leaf, None) for leaf in _GATES)]
    gate = next((gate for gate in gates if isinstance(gate, nn.Module)), None)
    weight = getattr(gate, "weight", None)
    why = None
    if gate is None or not isinstance(weight, Tensor) or weight.dim() != 2:
        why = "its router is no plain linear map (a quantized gate?)"
    elif runner._fse_fuse_gate:
        why = "its router is fused with the gate of the shared experts"
    elif runner.gate is not None and runner.routed_input_transform is not None:
        why = "its router reads what is transformed inside of the layer"
    elif runner.do_naive_dispatch_combine:
        why = "its tokens are gathered from other ranks"
    elif weight.shape[0] != runner.moe_config.num_logical_experts:
        why = f"it has {runner.moe_config.num_logical_experts} experts and a router of width {weight.shape[0]}"
    if why is not None:
        raise UnsupportedModel(f"{name} cannot read a memory: {why}")
    assert gate is not None and weight is not None  # noqa: S101, PT018
    num_experts, hidden_size = weight.shape  # packing may empty it
    return Site(layer, name, runner, gate, runner.gate is not None, num_experts, hidden_size)
