"""Which model a memory belongs to: the routers, not the name on the box."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from knnmoe.v1 import types_pb2

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
