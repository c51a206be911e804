"""Which model a memory belongs to: the routers, not the name on the box.

A memory's keys are router inputs and its values name experts, so two checkpoints may share a
memory exactly when their routers agree.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from knnmoe.fingerprint import ModelFingerprint
from torch import Tensor, nn

from model_runner.architectures.discovery import decoder_of, find_router_sites
from model_runner.errors import UnsupportedModel


def model_fingerprint(model: nn.Module) -> ModelFingerprint:
    """The fingerprint of `model`, whatever its dtype and devices; accelerate may offload it.

    Raises:
        UnsupportedModel: no routers; or a router's weights are on the meta device and nothing
            can load them.

    """
    sites = find_router_sites(model)
    config = getattr(decoder_of(model), "config", None)
    return ModelFingerprint(
        architecture=str(getattr(config, "model_type", type(model).__name__)),
        num_layers=len(sites),
        hidden_size=sites[0].hidden_size,
        num_experts=max(site.num_logits for site in sites),
        top_k=max(site.top_k for site in sites),
        router_hash=router_hash(sites),
    )


class HashedSite(Protocol):
    """What is hashed of a MoE layer: its number, and the module that makes its logits."""

    @property
    def layer(self) -> int:
        """0..L-1."""
        ...

    @property
    def name(self) -> str:
        """For messages."""
        ...

    @property
    def router(self) -> nn.Module:
        """Its weights are hashed."""
        ...


def router_hash(sites: Sequence[HashedSite]) -> str:
    """ModelFingerprint.router_hash. Raises UnsupportedModel for weights that are not loaded."""
    digest = hashlib.sha256()
    for site in sites:
        for path, module in site.router.named_modules():
            with _loaded(module):
                for name, tensor in _own_tensors(module):
                    full_name = f"{path}.{name}" if path else name
                    _update(digest, site, full_name, tensor)
    return digest.hexdigest()


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    parameters = list(module.named_parameters(recurse=False))
    return [*parameters, *module.named_buffers(recurse=False)]


def _loaded(module: nn.Module) -> AbstractContextManager[Any]:
    """Loads a module's offloaded weights, if accelerate keeps them elsewhere."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device  # only offloaded models need accelerate

    context: AbstractContextManager[Any] = align_module_device(module)
    return context


def _update(digest: Any, site: HashedSite, name: str, tensor: Tensor) -> None:
    if tensor.device.type == "meta":
        raise UnsupportedModel(
            f"the weight {name} of {site.name} is on the meta device; load the model's weights, or "
            "dispatch it with accelerate, before taking its fingerprint"
        )
    digest.update(f"{site.layer}:{name}:{list(tensor.shape)};".encode())
    digest.update(_canonical_bytes(tensor))


def _canonical_bytes(tensor: Tensor) -> bytes:
    values = tensor.detach().cpu()
    if values.is_floating_point():
        return values.to(torch.bfloat16).float().contiguous().numpy().astype("<f4").tobytes()
    return values.to(torch.int64).contiguous().numpy().astype("<i8").tobytes()
