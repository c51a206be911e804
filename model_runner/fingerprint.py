"""Which model a memory belongs to: the routers, not the name on the box.

A memory's keys are router inputs and its values name experts, so two checkpoints may share a
memory exactly when their routers agree.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from knnmoe.v1 import types_pb2
from torch import Tensor, nn

from model_runner.architectures.discovery import decoder_of, find_router_sites
from model_runner.architectures.families import RouterSite
from model_runner.errors import UnsupportedModel

# 64 bits tell models apart, and travel with every request.
_DIGEST_HEX_DIGITS = 16


@dataclass(frozen=True)
class ModelFingerprint:
    """The identity of a model's routers.

    Attributes:
        architecture: transformers' model type of the text decoder, such as `olmoe`; the same
            with and without a language head or a vision tower.
        num_layers: MoE layers.
        hidden_size: d, the width of the router input.
        num_experts: width of the routers' logits (`RouterSite.num_logits`), the largest if
            layers differ.
        top_k: experts per token of the model's own routers, the largest if layers differ.
        router_hash: SHA-256 in hex over all parameters and buffers of the routers, in layer
            order, under their names below the router. Floating values are rounded to bfloat16
            first, so that fp32 and bf16 loads of one checkpoint agree; the price is
            that changes smaller than bf16's rounding go unseen.

    """

    architecture: str
    num_layers: int
    hidden_size: int
    num_experts: int
    top_k: int
    router_hash: str

    def digest(self) -> str:
        """16 hex digits: SHA-256 over the fields as JSON with sorted keys and no spaces."""
        canonical = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:_DIGEST_HEX_DIGITS]

    def message(self) -> types_pb2.ModelFingerprint:
        """The fingerprint on the wire."""
        return types_pb2.ModelFingerprint(**asdict(self))


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
        router_hash=_router_hash(sites),
    )


def _router_hash(sites: tuple[RouterSite, ...]) -> str:
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


def _update(digest: Any, site: RouterSite, name: str, tensor: Tensor) -> None:
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
