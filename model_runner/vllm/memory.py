"""A memory that is served: lookups that never raise, what they came to, and the salt of the prefix cache."""

from __future__ import annotations

import logging
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from knnmoe.client import AdminClient, ServiceError, ServiceUnavailable
from knnmoe.fingerprint import ModelFingerprint
from knnmoe.v1.types_pb2 import SUPPORT_TOP_K
from torch import Tensor

from model_runner.architectures.families import Assignment
from model_runner.errors import UnsupportedModel
from model_runner.retrieval import OpenMemory, open_retriever
from model_runner.router_client import OnError
from model_runner.router_hooks import Logits
from model_runner.routing_policy import FellBack, Retrieved
from model_runner.vllm.config import Config
from model_runner.vllm.logit_space import as_logits, own_assignment

log = logging.getLogger("vllm.knn_moe")  # as vLLM shows its own

# A front end waits for it, and so does the engine.
DESCRIBE_TIMEOUT_S = 0.2


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a memory has to know of the model.

    Attributes:
        logits_say_assignments: see Site.

    """

    fingerprint: ModelFingerprint
    device: torch.device
    logits_say_assignments: bool
    router_dtype: torch.dtype


@dataclass(slots=True)
class ServedMemory:
    """Attributes: lookups: of all requests together, one per layer and forward pass; fell_back: of these, by reason."""

    name: str
    model: ServedModel
    opened: OpenMemory
    admin: AdminClient
    lookups: int = 0
    fell_back: Counter[str] = field(default_factory=Counter)
    _said: set[str] = field(default_factory=set)

    @property
    def answers_logits(self) -> bool:
        """Whether it blends router logits, or assignments."""
        return self.opened.retriever.wants_logits

    def routed(
        self, layer: int, router_input: Tensor, router_logits: Tensor
    ) -> Tensor | str | None:
        """Logits [T, N] in the place of those that are given; None: they stand; or why the lookup fell back."""
        self.lookups += 1
        try:
            found = self._found(layer, router_input, router_logits)
            if isinstance(found, Tensor):
                found = found.to(router_logits).view_as(router_logits)
        except Exception as error:  # noqa: BLE001  # within a forward pass it would end the engine
            found = self._failed(error)
        if isinstance(found, str):
            self.fell_back[found] += 1
        return found

    def salt(self) -> str:
        """What keys the prefix cache: entries of the KV cache are of this memory, in this version.

        It is of a version that lookups from now on have at least. Unique when nobody knows the version. What lookups
        that fell back left in the KV cache is of no version: their number goes with the salt (Serving.salt).
        """
        position = self._position()
        if position is None:
            return uuid.uuid4().hex
        digest = self.model.fingerprint.digest()
        return ":".join(map(str, (self.name, digest, *position)))

    def status(self) -> dict[str, Any]:
        """For health checks and metrics."""
        follower = self.opened.follower
        return {
            "where": str(self.opened.where),
            "lookups": self.lookups,
            "fell_back": dict(self.fell_back),
            "staleness_s": None
            if follower is None or not follower.complete
            else follower.staleness_s,
        }

    def _found(
        self, layer: int, router_input: Tensor, router_logits: Tensor
    ) -> Tensor | str | None:
        wants_logits = self.answers_logits
        top_k = self.model.fingerprint.top_k
        own = _nothing(router_logits) if wants_logits else own_assignment(router_logits, top_k)
        found = self.opened.retriever.lookup(layer, router_input, router_logits, own)
        if isinstance(found, FellBack):
            return found.reason
        if isinstance(found.blended, Assignment):
            return self._in_logits(found, found.blended, router_logits)
        return found.blended.router_logits if isinstance(found.blended, Logits) else None

    def _in_logits(self, found: Retrieved, blended: Assignment, own: Tensor) -> Tensor | str:
        if blended.experts.shape[1] != self.model.fingerprint.top_k:
            return "support_union"  # it was set while it was served
        return as_logits(blended, own, found.lambdas > 0)

    def _failed(self, error: Exception) -> str:
        reason = error.cause if isinstance(error, ServiceError) else type(error).__name__
        if reason not in self._said:
            self._said.add(reason)
            log.error(
                "a lookup in memory %r failed, the model's own router stands (said once): %s",
                *(self.name, error),
                exc_info=None if isinstance(error, ServiceError) else error,
            )
        return reason

    def _position(self) -> tuple[str, int] | None:
        follower = self.opened.follower
        if follower is not None:
            at = follower.position
            return None if at is None else (at.epoch, at.version)
        try:
            described = self.admin.describe(self.name)
        except ServiceError:
            return None
        return described.epoch, described.version


@contextmanager
def opened_memory(name: str, config: Config, model: ServedModel) -> Iterator[ServedMemory]:
    """A memory that is served within the block.

    Raises ServiceError (no such memory, another model's, no sidecar) and UnsupportedModel, each with both sides.
    """
    with (
        open_retriever(
            *(config.target, name, model.fingerprint, model.device, config.how()),
            timeout_s=config.timeout_s,
            on_error=OnError.FALL_BACK,
            credentials=config.credentials(),
        ) as opened,
        AdminClient(config.target, DESCRIBE_TIMEOUT_S, config.credentials()) as admin,
    ):
        if opened.described is None:
            raise ServiceUnavailable(
                f"memory {name!r} cannot be served: no sidecar answers at {config.target}; start it first",
                target=config.target,
            )
        memory = ServedMemory(name, model, opened, admin)
        if not memory.answers_logits:
            _require_exact(memory, opened.described.settings.support == SUPPORT_TOP_K)
        yield memory


def _require_exact(memory: ServedMemory, top_k_support: bool) -> None:
    model, name = memory.model, memory.name
    why = None
    if not top_k_support:
        why = f"it names more than top-k experts; `router-admin memory set {name} --support top_k`"
    elif not model.logits_say_assignments:
        why = (
            f"{model.fingerprint.architecture} does not scale the weights of its k experts to sum 1"
        )
    elif model.router_dtype != torch.float32:
        why = f"the router's logits are {model.router_dtype}, which rounds weights; serve with --dtype float32"
    if why is not None:
        raise UnsupportedModel(
            f"memory {name!r} holds assignments, which cannot be said in router logits here: {why}; or build a memory "
            "in logit space (`model-runner build --preset recommended`)"
        )


def _nothing(router_logits: Tensor) -> Assignment:
    """In the place of the own assignment [T, 0], where nobody reads it."""
    none = router_logits[:, :0]
    return Assignment(none, none.long())
