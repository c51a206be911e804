"""The worker's side: the model's MoE layers, the memories that it serves, and each forward pass of a batch."""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

import torch
from knnmoe.fingerprint import ModelFingerprint
from torch import Tensor, nn

from model_runner.fingerprint import router_hash
from model_runner.vllm import op
from model_runner.vllm.agreement import Agreement
from model_runner.vllm.batch import Group, RequestUse, grouped
from model_runner.vllm.config import Config
from model_runner.vllm.memory import ServedMemory, ServedModel, opened_memory
from model_runner.vllm.request import settled
from model_runner.vllm.site import Site, find_sites

log = logging.getLogger("vllm.knn_moe")  # as vLLM shows its own

# Types of models whose answers with a memory were compared with those of transformers.
TESTED_MODELS = (
    *("olmoe", "qwen3_moe", "mixtral", "gpt_oss"),
    *("qwen2_moe", "glm4_moe", "granitemoe"),
)
# Requests whose counts are kept for whoever asks for them later.
MOST_REPORTS = 4096


class Serving:
    """Of one worker, from the loading of the model until close().

    Attributes:
        sites: the hooked layers; none before the model is loaded.
        memories: by name; none on a rank that does not ask.
        device: of the model.

    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.sites: tuple[Site, ...] = ()
        self.memories: dict[str, ServedMemory] = {}
        self.device = torch.device("cpu")
        self._model: ServedModel | None = None
        self._stack = ExitStack()
        self._agreement: Agreement | None = None
        self._called: set[int] = set()  # in the forward pass that runs
        self._missed: set[int] = set()  # in any
        self._uses: dict[str, RequestUse] = {}
        self._reports: OrderedDict[str, list[RequestUse]] = OrderedDict()

    def load(self, model: nn.Module, architecture: str, device: torch.device) -> None:
        """Hooks a model whose weights are loaded and not yet packed, and opens the memories.

        Raises UnsupportedModel and ServiceError for what cannot be served.
        """
        self.sites, self.device = find_sites(model), device
        self._agreement = Agreement()
        served = self._model = ServedModel(
            fingerprint=model_fingerprint(self.sites, architecture),
            device=device,
            logits_say_assignments=all(site.logits_say_assignments for site in self.sites),
            router_dtype=self.sites[0].router.weight.dtype,  # type: ignore[arg-type]
        )
        if self._agreement.asks:
            for name in self.config.served:
                opened = opened_memory(name, self.config, served)
                self.memories[name] = self._stack.enter_context(opened)
        for site in self.sites:
            site.hook()
        if architecture not in TESTED_MODELS:
            log.warning(
                "knn_moe: model type %r is not among those that were tested with memories in vLLM (%s): compare its "
                "answers with those of model-runner before you rely on them",
                *(architecture, ", ".join(TESTED_MODELS)),
            )
        log.info(
            "knn_moe: hooked %d of %d MoE layers; memories %s",
            *(len(self.sites), len(self.sites), self.status()["memories"]),
        )

    def close(self) -> None:
        """Ends the lookups. Closing twice is allowed."""
        self._stack.close()

    @contextmanager
    def forward_pass(
        self, requests: Mapping[str, Any], ids: Sequence[str], starts: Sequence[int]
    ) -> Iterator[None]:
        """Within it the model runs a batch.

        requests: by id, with `sampling_params`. ids: of the batch. starts: where the tokens of each request begin, and
        where the last one's end.
        """
        uses = [self._use_of(id_, requests[id_].sampling_params) for id_ in ids]
        self._forget(requests)
        groups = grouped(uses, starts, self.device)
        if not groups:
            yield
            return
        with ExitStack() as versions:
            for group in groups:
                if group.memory in self.memories:
                    versions.enter_context(self.memories[group.memory].opened.one_version())
            versions.enter_context(op.running(_Forward(self, groups, starts[-1])))
            yield
        self._check_called()

    # Called by the engine and the front end, through collective_rpc; the first rank's answer counts.

    def salt(self, memory: str) -> tuple[str, int]:
        """ServedMemory.salt, and the lookups that had fallen back before; together they key the prefix cache."""
        fell_back = self.fell_back(memory)
        return (self.memories[memory].salt() if memory in self.memories else "", fell_back)

    def fell_back(self, memory: str) -> int:
        """Lookups in a memory that have fallen back so far."""
        return self.memories[memory].fell_back.total() if memory in self.memories else 0

    def status(self) -> dict[str, Any]:
        """What is hooked, the model's fingerprint, and each memory."""
        missed = [site.name for site in self.sites if site.layer in self._missed]
        return {
            "layers": len(self.sites),
            "hooked": len(self.sites) - len(missed),
            "missed": missed,
            "model": None if self._model is None else asdict(self._model.fingerprint),
            "memories": {name: memory.status() for name, memory in self.memories.items()},
        }

    def report(self, request: str) -> dict[str, Any]:
        """What the lookups of a request came to, by its tag or id; of several under one tag, all."""
        found = self._reports.get(request, [])
        reasons = sum((use.fell_back for use in found), Counter[str]())
        return {
            "memory": found[0].memory if found else None,
            "lookups": sum(use.lookups for use in found),
            "fell_back": reasons.total(),
            "reasons": dict(reasons),
        }

    def _route(self, groups: Sequence[Group], layer: int, x: Tensor, logits: Tensor) -> None:
        self._called.add(layer)
        assert self._agreement is not None  # noqa: S101
        if self._agreement.asks:
            for group in groups:
                memory = self.memories[group.memory]
                found = memory.routed(layer, x[group.rows], logits[group.rows])
                if isinstance(found, Tensor):
                    logits[group.rows] = found
                reason = found if isinstance(found, str) else None
                for use in group.uses:
                    use.count(reason)
        self._agreement.share(logits)

    def _use_of(self, id_: str, sampling_params: Any) -> RequestUse | None:
        use = self._uses.get(id_)
        if use is None and sampling_params is not None:
            memory, request = settled(sampling_params.extra_args)
            if memory is None:
                return None
            use = self._uses[id_] = RequestUse(memory, request)
            self._reports.setdefault(request, []).append(use)
            while len(self._reports) > MOST_REPORTS:
                self._reports.popitem(last=False)
        return use

    def _forget(self, requests: Mapping[str, Any]) -> None:
        if len(self._uses) > 2 * len(requests) + 64:
            self._uses = {id_: use for id_, use in self._uses.items() if id_ in requests}

    def _check_called(self) -> None:
        """A kernel, or a CUDA graph, that goes around a layer's hook is said, and shown by health checks."""
        if len(self._called) < len(self.sites):
            missed = {site.layer for site in self.sites} - self._called
            if not missed <= self._missed:
                self._missed |= missed
                log.error(
                    "knn_moe: layers ran without their hook: %s", ", ".join(self.status()["missed"])
                )
        self._called.clear()


class _Forward:
    """A forward pass of `tokens` tokens, and padding behind them."""

    def __init__(self, serving: Serving, groups: Sequence[Group], tokens: int) -> None:
        self._serving, self._groups, self._tokens = serving, groups, tokens

    def route(self, layer: int, router_input: Tensor, router_logits: Tensor) -> None:
        """See op.Pass."""
        width = self._serving.sites[layer].hidden_size
        x = router_input[: self._tokens, :width]
        self._serving._route(self._groups, layer, x, router_logits[: self._tokens])


def model_fingerprint(sites: Sequence[Site], architecture: str) -> ModelFingerprint:
    """As model_runner.fingerprint.model_fingerprint, of the same checkpoint."""
    return ModelFingerprint(
        architecture=architecture,
        num_layers=len(sites),
        hidden_size=sites[0].hidden_size,
        num_experts=max(site.num_experts for site in sites),
        top_k=max(site.top_k for site in sites),
        router_hash=router_hash(sites),
    )
