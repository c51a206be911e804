"""Which model a memory belongs to."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from functools import lru_cache

from router_service.errors import InvalidField, ModelMismatch, shorten


@dataclass(frozen=True, slots=True)
class ModelFingerprint:
    """The identity of a model to a memory; two are the same when every field agrees."""

    architecture: str
    num_layers: int
    hidden_size: int
    num_experts: int
    top_k: int
    router_hash: str

    def digest(self) -> str:
        """16 hex digits over the canonical JSON of the fields; what every Route carries."""
        return _digest(self)

    def require_same(self, other: ModelFingerprint, memory: str) -> None:
        """Raises ModelMismatch that names the memory, and each differing field on both sides."""
        differing = [
            f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name)
        ]
        if differing:
            both = "; ".join(
                f"{name}: memory {shorten(getattr(self, name))}, client {shorten(getattr(other, name))}"
                for name in differing
            )
            raise ModelMismatch(f"memory {memory!r} was made for another model ({both})")

    def require_digest(self, digest: str) -> None:
        """Raises ModelMismatch when a request's digest is not this model's."""
        if digest != self.digest():
            raise ModelMismatch(
                f"model_digest: got {shorten(digest, 64)}, expected {self.digest()!r} ({self.summary()}); "
                "call Describe with the client's fingerprint to see which field differs"
            )

    def summary(self) -> str:
        """One line for messages."""
        return (
            f"{shorten(self.architecture)}, {self.num_layers} MoE layers, hidden size {self.hidden_size}, "
            f"{self.num_experts} experts, top-{self.top_k}, routers {self.router_hash[:12]}"
        )


@lru_cache(maxsize=128)  # every Route compares digests
def _digest(fingerprint: ModelFingerprint) -> str:
    text = json.dumps(asdict(fingerprint), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def validate(fingerprint: ModelFingerprint) -> None:
    """Raises InvalidField on a fingerprint that no model has."""
    limits = {"num_layers": 4096, "hidden_size": 65_536, "num_experts": 65_536, "top_k": 1024}
    for name, most in limits.items():
        value = getattr(fingerprint, name)
        if not 1 <= value <= most:
            raise InvalidField(f"fingerprint.{name}", value, f"1 to {most}")
    if fingerprint.top_k > fingerprint.num_experts:
        raise InvalidField(
            "fingerprint.top_k",
            fingerprint.top_k,
            f"at most num_experts ({fingerprint.num_experts})",
        )
    for name in ("architecture", "router_hash"):
        value = getattr(fingerprint, name)
        if not 1 <= len(value) <= 256:
            raise InvalidField(f"fingerprint.{name}", value, "1 to 256 characters")
