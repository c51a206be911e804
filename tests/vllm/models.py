"""Tiny random models that vLLM runs on a CPU, memories of made-up entries, and what transformers makes of both."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from knnmoe import tensors
from knnmoe.fingerprint import ModelFingerprint
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from knnmoe.v1 import types_pb2 as pb
from torch import Tensor, nn

from model_runner.fingerprint import model_fingerprint
from model_runner.router_client import OnError, RouterClient
from model_runner.router_hooks import Policy, RouterCall, RouterHooks
from model_runner.routing_policy import RetrievalPolicy
from model_runner.vllm.logit_space import own_assignment
from model_runner.wire import encode_assignment, encode_floats
from tests.families import tiny_model
from tests.sidecar import Sidecar

VOCABULARY = 512
NEW_TOKENS = 12
# vLLM's kernels want heads of 32 or more; the spread of the weights makes experts matter.
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "head_dim": 32,
    "num_hidden_layers": 3,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "num_experts": 16,
    "num_local_experts": 16,
    "num_experts_per_tok": 4,
}
_OWN: dict[str, dict[str, Any]] = {
    "olmoe": {"num_experts": 16, "num_key_value_heads": 2},
    "qwen3_moe": {"num_experts": 16, "norm_topk_prob": True, "moe_intermediate_size": 64},
    "mixtral": {"num_local_experts": 16, "sliding_window": None},
    "gpt_oss": {
        "num_local_experts": 16,
        "intermediate_size": 64,
        "sliding_window": 512,
        "layer_types": ["full_attention"] * 3,
    },
}
FAMILIES = tuple(_OWN)
# Each with another routing: beside shared experts, sigmoid with a correction of the choice, scaled logits.
_MORE: dict[str, dict[str, Any]] = {
    "qwen2_moe": {
        "num_experts": 16,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "norm_topk_prob": False,
    },
    "glm4_moe": {
        "n_routed_experts": 16,
        "moe_intermediate_size": 64,
        "n_group": 1,
        "topk_group": 1,
    },
    "granitemoe": {"num_local_experts": 16},
}
MORE_FAMILIES = tuple(_MORE)
# Their log-probabilities lie wider apart.
_SPREAD = {"gpt_oss": 1.2, "granitemoe": 1.2}


@dataclass(frozen=True)
class Checkpoint:
    """A model as transformers has it, saved where vLLM finds it."""

    family: str
    path: Path
    model: nn.Module
    fingerprint: ModelFingerprint


@dataclass(frozen=True)
class Text:
    """What a model makes of a prompt: log-probabilities [P - 1] of its tokens, and its greedy continuation."""

    prompt: list[float]
    tokens: list[int]
    logprobs: list[float]

    def answer(self) -> Text:
        """Without the prompt's."""
        return replace(self, prompt=[])


def saved(family: str, path: Path) -> Checkpoint:
    """A seeded model of the family."""
    common = {
        k: v
        for k, v in _SHAPE.items()
        if not k.startswith("num_") or "layers" in k or "per_tok" in k
    }
    model = tiny_model(family, **(common | (_OWN | _MORE)[family]))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2 and "embed" not in name:
                weight.mul_(_SPREAD.get(family, 1.6))
    model.save_pretrained(path)
    return Checkpoint(family, path, model, model_fingerprint(model))


def prompts(count: int, length: int = 40, seed: int = 0) -> list[list[int]]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (count, length), generator=generator).tolist()


@torch.no_grad()
def written(
    checkpoint: Checkpoint, texts: Sequence[Sequence[int]], policy: Policy | None = None
) -> list[Text]:
    """What transformers makes of prompts, with a policy at its routers."""
    model = checkpoint.model
    with RouterHooks(model, policy) if policy is not None else nullcontext():
        return [_written(model, text) for text in texts]


def _written(model: nn.Module, ids: Sequence[int]) -> Text:
    output = model(torch.tensor([ids]), use_cache=True)
    scores = torch.log_softmax(output.logits[0].float(), -1)
    prompt = scores[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    last, tokens, logprobs = scores[-1], list[int](), list[float]()
    while True:
        token = int(last.argmax())
        tokens.append(token)
        logprobs.append(float(last[token]))
        if len(tokens) == NEW_TOKENS:
            return Text(prompt, tokens, logprobs)
        output = model(
            torch.tensor([[token]]), past_key_values=output.past_key_values, use_cache=True
        )
        last = torch.log_softmax(output.logits[0, -1].float(), -1)


def with_memory(
    checkpoint: Checkpoint, target: str, memory: str, texts: Sequence[Sequence[int]]
) -> list[Text]:
    """What transformers makes of prompts with a memory in a sidecar."""
    options: Any = {"on_error": OnError.RAISE, "timeout_s": 20}
    with RouterClient(target, memory, checkpoint.fingerprint, **options) as client:
        return written(checkpoint, texts, RetrievalPolicy(client))


def fill(
    sidecar: Sidecar,
    name: str,
    checkpoint: Checkpoint,
    texts: Sequence[Sequence[int]],
    seed: int = 0,
    **settings: Any,
) -> None:
    """A memory of the model's own router inputs for `texts`, with made-up values that move its output."""
    keys = router_inputs(checkpoint, texts)
    spread = keys[max(keys)].var(0).sum().item() * 2
    defaults = {"gamma": [0.3 / spread], "preset": "recommended"}
    sidecar.create(name, model=asdict(checkpoint.fingerprint), **(defaults | settings))
    _upsert(sidecar, name, checkpoint, keys, seed, first=0)


def deleted(sidecar: Sidecar, name: str) -> None:
    """There is no such memory any more."""
    sidecar.admin.DeleteMemory(admin_pb.DeleteMemoryRequest(memory=name), timeout=60)


def made_for_another_model(sidecar: Sidecar, name: str, checkpoint: Checkpoint) -> None:
    """A memory is made anew, empty, for a model with other routers."""
    deleted(sidecar, name)
    sidecar.create(name, model=asdict(replace(checkpoint.fingerprint, router_hash="0" * 64)))


def more(
    sidecar: Sidecar, name: str, checkpoint: Checkpoint, texts: Sequence[Sequence[int]]
) -> None:
    """Further entries in a memory."""
    _upsert(sidecar, name, checkpoint, router_inputs(checkpoint, texts), seed=99, first=100_000)


@torch.no_grad()
def router_inputs(checkpoint: Checkpoint, texts: Sequence[Sequence[int]]) -> dict[int, Tensor]:
    """Of every token of the texts, by layer."""
    found: dict[int, list[Tensor]] = {}

    def keep(call: RouterCall) -> None:
        found.setdefault(call.site.layer, []).append(call.router_input)

    with RouterHooks(checkpoint.model, keep):
        for text in texts:
            checkpoint.model(torch.tensor([text]), use_cache=False)
    return {layer: torch.cat(inputs) for layer, inputs in found.items()}


def _upsert(
    sidecar: Sidecar,
    name: str,
    checkpoint: Checkpoint,
    keys: dict[int, Tensor],
    seed: int,
    first: int,
) -> None:
    kind, generator = sidecar.describe(name).settings.kind, torch.Generator().manual_seed(seed)
    for layer, inputs in keys.items():
        entries = _entries(inputs, kind, checkpoint.fingerprint, generator)
        ids = (np.arange(len(inputs), dtype=np.uint64) + np.uint64(first)) * np.uint64(7919)
        entries.ids.CopyFrom(tensors.to_tensor(ids))
        sidecar.upsert(name, layer, entries)


def _entries(
    keys: Tensor, kind: int, model: ModelFingerprint, generator: torch.Generator
) -> admin_pb.Entries:
    origins = [
        pb.Provenance(source="text", example=str(n % 7), position=n) for n in range(len(keys))
    ]
    entries = admin_pb.Entries(keys=encode_floats(keys), provenance=origins)
    values = torch.randn(len(keys), model.num_experts, generator=generator) * 2
    if kind == pb.MEMORY_KIND_LOGIT_DELTA:
        entries.logit_deltas.CopyFrom(encode_floats(values))
    elif kind == pb.MEMORY_KIND_LOGITS:
        entries.logits.CopyFrom(encode_floats(values))
    else:
        entries.assignments.CopyFrom(encode_assignment(own_assignment(values, model.top_k)))
    return entries
