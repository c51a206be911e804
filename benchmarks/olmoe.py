"""An OLMoE of the real layer shape with random weights: its tokens, its keys, and passes through it that are timed.

Run by its path it is a process that times the remote way of whichever checkout PYTHONPATH names, so that two versions
take turns in one run (`benchmarks.end_to_end --old`); so it knows nothing of the other benchmarks.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from knnmoe.client import AdminClient
from knnmoe.v1.types_pb2 import MEMORY_KIND_LOGIT_DELTA, MemorySettings, Provenance
from torch import Tensor, nn
from transformers import DynamicCache, OlmoeConfig, OlmoeForCausalLM
from transformers.initialization import no_init_weights

from model_runner.architectures.families import Assignment
from model_runner.fingerprint import model_fingerprint
from model_runner.memory_builder.entries import Destination, LayerEntries, upsert_requests
from model_runner.router_client import RouterClient
from model_runner.router_hooks import Policy, RouterCall, RouterHooks
from model_runner.routing_policy import RetrievalPolicy

WEIGHT_RANGE = 0.035  # uniform weights of standard deviation 0.02, as OLMoE's
WINDOW = 512  # tokens of a text that keys are made from
DECODED = 8  # tokens that a timed decoding goes on for
LAMBDA0 = 0.5  # a query at the median distance has this similarity
KEYS_FOR_GAMMA = 20_000
NULL_WEIGHT = 0.5
STEP_SIZE = 0.5
TIMEOUT_S = 600.0
MEMORY = "olmoe"


@dataclass(frozen=True, slots=True)
class Shape:
    """OLMoE-1B-7B's layers; how many, and how many of the token embeddings' rows."""

    layers: int
    hidden: int = 2048
    experts: int = 64
    top_k: int = 8
    intermediate: int = 1024
    heads: int = 16
    vocabulary: int = 50_304
    keys: int = 20_000
    seed: int = 0

    @classmethod
    def tiny(cls, layers: int, keys: int = 500, seed: int = 0) -> Shape:
        """The same code in a second."""
        return cls(layers, 64, 8, 2, 32, 4, 512, keys, seed)


@dataclass(frozen=True, slots=True)
class Pass:
    """What is timed: `batch` sequences of `tokens` tokens at once, or DECODED tokens one by one after as many."""

    kind: str  # prefill or decode
    batch: int
    tokens: int

    @property
    def name(self) -> str:
        """E.g. `decode x8`."""
        return f"{self.kind} x{self.batch}"


def make_model(shape: Shape, device: str = "cpu") -> nn.Module:
    """In bf16 and evaluation mode, of weights that depend on the shape alone."""
    config = OlmoeConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        tie_word_embeddings=True,
        pad_token_id=None,
        eos_token_id=None,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device), no_init_weights():
            model: nn.Module = OlmoeForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator(device).manual_seed(shape.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                parameter.uniform_(-WEIGHT_RANGE, WEIGHT_RANGE, generator=generator)
    return model.eval().requires_grad_(requires_grad=False)


def zipf_tokens(shape: Shape, batch: int, tokens: int, seed: int) -> Tensor:
    """Token ids [B, S] whose frequencies fall off as those of words do."""
    rng = np.random.default_rng([shape.seed, seed])
    shares = 1 / np.arange(1, shape.vocabulary + 1)
    drawn = rng.choice(shape.vocabulary, size=(batch, tokens), p=shares / shares.sum())
    return torch.from_numpy(drawn)


def router_inputs(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    """What each layer's router sees of tokens [B, S]: [B*S, d] per layer, in the model's dtype."""
    seen: dict[int, Tensor] = {}

    def keep(call: RouterCall) -> None:
        seen[call.site.layer] = call.router_input.clone()

    with RouterHooks(model, keep), torch.no_grad():
        model.model(input_ids=tokens.to(_device(model)))  # type: ignore[operator]
    return [seen[layer] for layer in sorted(seen)]


@dataclass(frozen=True, slots=True)
class Entries:
    """A memory's entries and the bandwidth that fits them, by layer; on the CPU."""

    keys: list[Tensor]  # bf16 [n, d]
    deltas: list[Tensor]  # f32 [n, N] logit deltas
    assignments: list[Assignment]  # [n, k]
    gammas: list[float]
    held_out: list[Tensor]  # bf16 [h, d] router inputs that are not in the memory


def make_entries(model: nn.Module, shape: Shape, cache: Path | None) -> Entries:
    """The model's own router inputs as keys, kept in `cache` from one run to the next; values are made up."""
    file = None if cache is None else cache / f"keys-{_name(shape)}.pt"
    keys, held_out = _kept(file, lambda: _make_keys(model, shape))
    generator = torch.Generator().manual_seed(shape.seed)
    deltas, assignments = [], []
    for rows in keys:
        deltas.append(torch.randn(len(rows), shape.experts, generator=generator))
        drawn = torch.rand(len(rows), shape.experts, generator=generator).topk(shape.top_k)
        assignments.append(Assignment(drawn.values / shape.experts, drawn.indices))
    gammas = [_gamma(k, q) for k, q in zip(keys, held_out, strict=True)]
    return Entries(keys, deltas, assignments, gammas, held_out)


def _make_keys(model: nn.Module, shape: Shape) -> tuple[list[Tensor], list[Tensor]]:
    texts = -(-shape.keys // WINDOW) + 1
    found: list[list[Tensor]] = [[] for _ in range(shape.layers)]
    for text in range(texts):
        for layer, rows in enumerate(router_inputs(model, zipf_tokens(shape, 1, WINDOW, text))):
            found[layer].append(rows.cpu())
    held_out = [rows.pop() for rows in found]
    return [torch.cat(rows)[: shape.keys].clone() for rows in found], held_out


def _gamma(keys: Tensor, queries: Tensor) -> float:
    nearest = torch.cdist(queries.float(), keys[:KEYS_FOR_GAMMA].float()).amin(dim=1)
    return float(-np.log(LAMBDA0) / max(float(nearest.square().median()), 1e-12))


def _kept(file: Path | None, make: Callable[[], Any]) -> Any:
    if file is None:
        return make()
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        made, partial = make(), file.with_suffix(".partial")
        torch.save(made, partial)
        partial.replace(file)
    return torch.load(file)


def _name(shape: Shape) -> str:
    return "-".join(str(number) for number in asdict(shape).values())


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@dataclass(slots=True)
class Passes:
    """Passes through one model, ready to be timed with one policy or another."""

    model: nn.Module
    shape: Shape
    clock_ns: Callable[[], int] = time.perf_counter_ns
    _caches: dict[Pass, DynamicCache] = field(default_factory=dict)

    def run(self, what: Pass, number: int, policy: Policy | None) -> list[int]:
        """Nanoseconds of a prefill, or of each decoded token; the same `number`, the same tokens."""
        cache = self._plain_cache(what) if what.kind == "decode" else DynamicCache()
        hooks = nullcontext() if policy is None else RouterHooks(self.model, policy)
        with hooks, torch.no_grad():
            if what.kind == "prefill":
                return [self._timed(self._tokens(what.batch, what.tokens, number), cache)]
            tokens = self._tokens(what.batch, DECODED, number)
            elapsed = [self._timed(tokens[:, at : at + 1], cache) for at in range(DECODED)]
            cache.crop(-DECODED)
            return elapsed

    def _plain_cache(self, what: Pass) -> DynamicCache:
        """Of a prompt that the plain model read, whichever arm comes first."""
        if what not in self._caches:
            self._caches[what] = DynamicCache()
            with torch.no_grad():
                self._timed(self._tokens(what.batch, what.tokens, -1), self._caches[what])
        return self._caches[what]

    def _tokens(self, batch: int, tokens: int, number: int) -> Tensor:
        return zipf_tokens(self.shape, batch, tokens, 10_000 + number).to(_device(self.model))

    def _timed(self, tokens: Tensor, cache: DynamicCache) -> int:
        """The decoder alone: what a head costs does not grow with the layers."""
        mask = torch.ones(len(tokens), cache.get_seq_length() + tokens.shape[1], dtype=torch.long)
        mask = mask.to(tokens.device)
        started = self.clock_ns()
        self.model.model(  # type: ignore[operator]
            input_ids=tokens, attention_mask=mask, past_key_values=cache
        )
        if tokens.is_cuda:
            torch.cuda.synchronize()
        return self.clock_ns() - started


def fill(
    target: str, model: nn.Module, entries: Entries, layers: Sequence[int] | None = None
) -> None:
    """Makes a logit-delta memory of the entries (of some layers only) and indexes it with int8 search keys."""
    fingerprint = model_fingerprint(model)
    settings = MemorySettings(
        kind=MEMORY_KIND_LOGIT_DELTA,
        neighbours=1,
        gamma=entries.gammas,
        step_size=[STEP_SIZE],
        null_weight=NULL_WEIGHT,
    )
    with AdminClient(target, TIMEOUT_S) as client:
        client.find_or_create(MEMORY, fingerprint.message(), settings)
        to = Destination(MEMORY, fingerprint.digest())
        filled = range(len(entries.keys)) if layers is None else layers
        with client.upserter() as upserter:
            for layer in filled:
                keys = entries.keys[layer]
                rows = LayerEntries(
                    layer,
                    np.arange(len(keys), dtype=np.uint64) + np.uint64(1),
                    keys.float(),
                    entries.deltas[layer],
                    [
                        Provenance(source="made up", example=str(n // WINDOW))
                        for n in range(len(keys))
                    ],
                )
                for request in upsert_requests(rows, to):
                    upserter.send(request)
            upserter.finish()
        client.optimize(MEMORY, "int8", filled)


@dataclass(slots=True)
class Remote:
    """The policy that asks a sidecar, with K set before each pass."""

    target: str
    client: RouterClient
    policy: RetrievalPolicy
    _neighbours: int = 0

    @classmethod
    def of(cls, target: str, model: nn.Module) -> Remote:
        """Fails when the sidecar does: an outage is no measurement."""
        fingerprint = model_fingerprint(model)
        client = RouterClient(target, MEMORY, fingerprint, timeout_s=TIMEOUT_S, on_error="raise")
        client.describe()
        return cls(target, client, RetrievalPolicy(client))

    def read(self, neighbours: int) -> None:
        """From here on the memory reads K neighbours."""
        if neighbours != self._neighbours:
            with AdminClient(self.target, TIMEOUT_S) as admin:
                admin.update_settings(self.client.memory, MemorySettings(neighbours=neighbours))
            self._neighbours = neighbours

    def close(self) -> None:
        """Ends the connection."""
        self.client.close()


def serve(arguments: Sequence[str]) -> None:
    """A request per line on stdin, its nanoseconds on stdout, until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    for option in ("--target", "--shape", "--cache", "--threads"):
        parser.add_argument(option, required=True)
    given = parser.parse_args(arguments)
    torch.set_num_threads(int(given.threads))
    shape = Shape(**json.loads(given.shape))
    model = make_model(shape)
    with AdminClient(given.target, TIMEOUT_S) as client:
        there = client.find(MEMORY)
    if there is None:
        fill(given.target, model, make_entries(model, shape, Path(given.cache)))
    remote, passes = Remote.of(given.target, model), Passes(model, shape)
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["neighbours"]:
            remote.read(asked["neighbours"])
        policy = remote.policy if asked["neighbours"] else None
        print(json.dumps(passes.run(Pass(**asked["pass"]), asked["number"], policy)), flush=True)
    remote.close()


if __name__ == "__main__":
    serve(sys.argv[1:])
