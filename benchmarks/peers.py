"""FAISS in the model's process, behind the hook that everything else goes through: what a user would write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.lanes import FAISS_FLAT, FAISS_HNSW, HNSW_EF, HNSW_LINKS
from benchmarks.olmoe import NULL_WEIGHT, STEP_SIZE, Entries
from model_runner.architectures.families import Assignment
from model_runner.progress import Progress
from model_runner.router_hooks import Logits
from model_runner.routing_policy import Retrieved

FAISS_IVFPQ = "faiss ivfpq"
KINDS = (FAISS_FLAT, FAISS_HNSW, FAISS_IVFPQ)
# About the square root of 20,000 lists, of which a sixteenth is looked through; a byte per 32 dimensions.
LISTS, PROBES, DIMENSIONS_PER_BYTE = 128, 8, 32
# FAISS wants 39 keys per centroid, of which there are 256; with all 20,000 it trains for minutes.
TRAINED_WITH = 10_000


@dataclass(slots=True)
class FaissRetriever:
    """An index per layer, and the arithmetic of a logit-delta memory in torch."""

    indexes: Sequence[Any]
    entries: Entries
    neighbours: int

    def lookup(
        self, layer: int, router_input: Tensor, router_logits: Tensor, own: Assignment, **_: Any
    ) -> Retrieved:
        """T tokens; see Retriever."""
        queries = router_input.float().numpy()
        found = self.indexes[layer].search(queries, self.neighbours)
        squared, rows = (torch.from_numpy(each) for each in found)
        similarities = torch.exp(-self.entries.gammas[layer] * squared.clamp(min=0))
        total = similarities.sum(dim=1, keepdim=True)
        shares = STEP_SIZE * similarities / (total + NULL_WEIGHT)
        step = torch.einsum("tk,tkn->tn", shares, self.entries.deltas[layer][rows])
        lambdas = (total / (total + NULL_WEIGHT)).squeeze(1)
        blended = Logits((router_logits.float() + step).to(router_logits.dtype))
        return Retrieved(lambdas, torch.zeros(len(rows), dtype=torch.bool), blended)


def faiss_indexes(
    faiss: Any, kind: str, entries: Entries, cache: Path, progress: Progress
) -> list[Any]:
    """One per layer; what takes long to build is kept in `cache` (a name that the keys have)."""
    return [
        _index(faiss, kind, keys, cache.with_suffix(f".{layer}.{kind.replace(' ', '-')}"), progress)
        for layer, keys in enumerate(entries.keys)
    ]


def _index(faiss: Any, kind: str, keys: Tensor, file: Path, progress: Progress) -> Any:
    if kind == FAISS_FLAT:
        index = faiss.IndexFlatL2(keys.shape[1])
        index.add(keys.float().numpy())
    elif file.exists():
        index = faiss.read_index(str(file))
    else:
        progress.say(f"{kind} ...")
        index = _trained(faiss, kind, keys.float())
        file.parent.mkdir(parents=True, exist_ok=True)
        faiss.write_index(index, str(file))
    if kind == FAISS_HNSW:
        index.hnsw.efSearch = HNSW_EF
    elif kind == FAISS_IVFPQ:
        index.nprobe = PROBES
    return index


def _trained(faiss: Any, kind: str, keys: Tensor) -> Any:
    count, dimension = keys.shape
    if kind == FAISS_HNSW:
        index = faiss.IndexHNSWFlat(dimension, HNSW_LINKS)
    else:
        lists = min(LISTS, count // 40)  # FAISS wants 39 keys a list
        codes = max(1, dimension // DIMENSIONS_PER_BYTE)
        index = faiss.IndexIVFPQ(faiss.IndexFlatL2(dimension), dimension, lists, codes, 8)
        index.train(keys[:TRAINED_WITH].numpy())
    index.add(keys.numpy())
    return index
