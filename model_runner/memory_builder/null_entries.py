"""Null entries: they change nothing, and stand where a memory would change the routing of other text most.

Near them a lookup has them among its neighbours, and the memory keeps silent (docs/experiments.md). Where it changes
little anyway they would only take room.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from knnmoe.client import AdminClient
from knnmoe.v1.retention_pb2 import DeleteRequest, EntryFilter
from torch import Tensor, nn

from model_runner.errors import BadInput
from model_runner.memory_builder.entries import GENERAL_SOURCE, sources_of
from model_runner.progress import Progress
from model_runner.router_hooks import Logits, Policy, RouterCall, RouterHooks
from model_runner.texts import Window, batched, make_batch

# Tokens of other text that are looked at for each null entry.
LOOKED_AT = 8


def changes(
    model: nn.Module,
    windows: Sequence[Window],
    policy: Policy,
    progress: Progress,
    *,
    batch_size: int = 16,
) -> list[Tensor]:
    """How far a memory would move the logits of each token with a loss: Euclidean length f32 [n] per layer.

    In the order of `entry_ids` of the batches. policy: of a memory of logit deltas; its answers are noted, and the
    model routes as it does. Raises BadInput for a memory of another kind.
    """
    device = next(model.parameters()).device
    found: dict[int, list[Tensor]] = {}

    def note(keep: Tensor, call: RouterCall) -> None:
        answer = policy(call)
        if answer is None:
            change = torch.zeros(len(keep), device=keep.device)
        elif isinstance(answer, Logits):
            change = (answer.router_logits.float() - call.router_logits.float()).norm(dim=1)
        else:
            raise BadInput("the memory holds routings, expected logit deltas")
        found.setdefault(call.site.layer, []).append(change[keep].cpu())

    groups = list(batched(windows, batch_size))
    for group in progress.track(groups, "general text", unit="batches"):
        batch = make_batch(group, device)
        heard = partial(note, batch.predicts.flatten())
        with torch.no_grad(), RouterHooks(model, heard) as hooks:
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            hooks.assert_complete()
    return [torch.cat(found[layer]) for layer in sorted(found)]


def largest(changes: Tensor, count: int) -> Tensor:
    """Which of some changes [n] are among the `count` largest, bool [n]; of equal ones the first."""
    order = changes.argsort(descending=True, stable=True)
    return torch.zeros(len(changes), dtype=torch.bool).index_fill(0, order[:count], True)


def windows_to_look_at(entries: int, windows: Sequence[Window]) -> int:
    """How many of these windows hold LOOKED_AT tokens for each of a layer's entries, all of them at most."""
    tokens = sum(window.targets for window in windows) / len(windows)
    return min(len(windows), math.ceil(LOOKED_AT * entries / tokens))


def counts(client: AdminClient, memory: str, source: str) -> tuple[int, int]:
    """Entries of the last layer, which is written last: those of a source, and those that are no null entries."""
    origins = sources_of(client, memory)
    others = sum(n for name, n in origins.items() if not name.startswith(GENERAL_SOURCE))
    return origins[source], others


def forget(client: AdminClient, memory: str, source: str) -> None:
    """Deletes a source's entries."""
    request = DeleteRequest(memory=memory, filter=EntryFilter(source=source))
    client.unary(client.retention.Delete, request, long=True, repeat=True)
