"""A frozen model with its memory as a model of lm-evaluation-harness. Importing this module registers it, as "knn-moe".

    import lm_eval
    import model_runner.harness.model
    lm_eval.simple_evaluate("knn-moe", {"pretrained": DIR, "memory": "law"}, tasks=["medqa_4options"])

lm_eval's own command finds it by the entry point `lm_eval.models`, in releases after 0.4.13, which looks for none;
`model-runner lm-eval` is that command with this module imported.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from knnmoe.client import AdminClient, require_same_model
from knnmoe.v1.routing_pb2 import MemoryDescription
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from model_runner.errors import BadInput, MemoryChanged
from model_runner.fingerprint import model_fingerprint
from model_runner.memory import DEFAULT_TARGET, MemoryReport, RoutingMemory
from model_runner.models import pick_device
from model_runner.replica.budget import parse_bytes
from model_runner.retrieval import Retrieval
from model_runner.router_client import OnError
from model_runner.small_moe import MODEL_DIR

log = logging.getLogger(__name__)

# A busy sidecar gets its time, as with `model-runner evaluate`; a replica too, since whether the memory was changed is
# asked after each kind of request.
TIMEOUT_S = 60.0


@register_model("knn-moe")
class KnnMoeLM(HFLM):  # type: ignore[misc]
    """The harness's own Hugging Face model, which routes with a memory while it answers.

    Between its answers the model is the plain one, bit for bit; so it is always without a memory, or with an empty one.

    Args:
        pretrained: directory, hub name or loaded model; the small one that ships with this package by default.
        memory: its name; None: none.
        target: address of the sidecar, HOST:PORT or unix:PATH.
        retrieval, replica_memory, replica_keys, first_pass, max_staleness_s: as the options of `model-runner evaluate`.
        timeout_s: longest wait for one lookup in the sidecar.
        device: an accelerator when there is one, if not given.
        options: of HFLM.

    Raises BadInput; UnsupportedModel, HookBypassed; of knnmoe.client MemoryNotFound, ModelMismatch,
    ServiceUnavailable: at once, and while it answers. A lookup that fails is an error, and so is a memory that is
    changed between the first answer and the last (MemoryChanged).

    """

    def __init__(
        self,
        pretrained: Any = str(MODEL_DIR),
        memory: str | None = None,
        target: str = DEFAULT_TARGET,
        retrieval: str = "auto",
        replica_memory: str | int | None = None,
        replica_keys: Any = "f32",
        first_pass: str = "auto",
        max_staleness_s: float | None = TIMEOUT_S,
        timeout_s: float = TIMEOUT_S,
        device: str | None = None,
        **options: Any,
    ) -> None:
        most = None if replica_memory is None else parse_bytes(str(replica_memory))
        try:
            how = Retrieval(retrieval, most, replica_keys, first_pass, max_staleness_s)
        except ValueError as error:
            raise BadInput(str(error)) from error
        self._memory: RoutingMemory | None = None
        self._reports = list[MemoryReport]()
        name = None if memory is None else str(memory)  # the harness makes numbers of some names
        # What is not there is noticed before the model is loaded.
        described = None if name is None else _describe(target, name)
        super().__init__(pretrained, device=device or str(pick_device("auto")), **options)
        if name is None or described is None:
            return
        self._memory = RoutingMemory(
            self.model,
            name,
            target=target,
            retrieval=how,
            on_error=OnError.RAISE,
            timeout_s=timeout_s,
        )
        self._described, self._where = described, how.where
        require_same_model(described, model_fingerprint(self.model).message(), target)
        if not any(layer.entries for layer in described.layers):
            log.warning("memory %r is empty: answers are the plain model's", name)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """As HFLM's: log-likelihood in nats of each continuation, and whether it is the greedy one."""
        with self._routing():
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """As HFLM's: log-likelihood in nats of each whole text."""
        with self._routing():
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """As HFLM's: what the model says after each context, up to a stop."""
        with self._routing():
            return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Refuses a cache of answers, which knows them by their question and not by the memory. Raises BadInput."""
        if self._memory is not None and cache_hook.dbdict is not None:
            raise BadInput(
                "use_cache: its answers would be taken for those of another memory, or of none; leave it out"
            )
        super().set_cache_hook(cache_hook)

    def get_model_info(self) -> dict[str, Any]:
        """As HFLM's, for the results; and what the memory was and did."""
        info: dict[str, Any] = super().get_model_info()
        if self._memory is None:
            return info
        reports = self._reports
        tokens = sum(report.tokens for report in reports)
        weight = sum(report.tokens * report.lambda_mean for report in reports)
        fallbacks = sum(sum(report.fallbacks.values()) for report in reports)
        return info | {
            "memory": self._memory.memory,
            "memory_epoch": self._described.epoch,
            "memory_version": self._described.version,
            "memory_entries": sum(layer.entries for layer in self._described.layers),
            "memory_retrieval": str(self._where),
            "memory_tokens": tokens,
            "memory_lambda_mean": weight / tokens if tokens else 0.0,
            "memory_fallbacks": fallbacks,
        }

    @contextmanager
    def _routing(self) -> Iterator[None]:
        """Within it the model routes with the memory, which stays the one that was described first."""
        if self._memory is None:
            yield
            return
        with self._memory as memory:
            self._require_unchanged(memory)
            yield
            self._require_unchanged(memory)
            self._where = memory.where
        self._reports.append(memory.report)
        if memory.report.fallbacks:  # not for a sidecar's sake: that is an error
            log.warning("lookups that fell back: %s", dict(memory.report.fallbacks))

    def _require_unchanged(self, memory: RoutingMemory) -> None:
        now, before = _describe(memory.target, memory.memory), self._described
        if (now.epoch, now.version) != (before.epoch, before.version):
            raise MemoryChanged(
                f"memory {now.name!r} was changed, or its sidecar started again, while tasks were scored: answers "
                "would be of two memories; run again when nothing writes to it (a snapshot, restored under another "
                "name, stays as it is)"
            )


def _describe(target: str, memory: str) -> MemoryDescription:
    with AdminClient(target) as admin:
        return admin.describe(memory)


def run_command(arguments: Sequence[str]) -> None:
    """The command of lm_eval with these arguments; "knn-moe" is registered. Raises what the model raises."""
    from lm_eval.__main__ import cli_evaluate

    before = sys.argv
    sys.argv = ["lm-eval", *arguments]  # it reads them there
    try:
        cli_evaluate()
    finally:
        sys.argv = before
