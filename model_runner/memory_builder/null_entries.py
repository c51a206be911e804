"""Null entries: they change nothing, and stand where a memory would change the routing of other text most.

Near them a lookup has them among its neighbours, and the memory keeps silent (docs/experiments.md). Where it changes
little anyway they would only take room.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from knnmoe.client import AdminClient
from knnmoe.v1.memory_admin_pb2 import ListSourcesRequest
from knnmoe.v1.retention_pb2 import DeleteRequest, EntryFilter
from knnmoe.v1.types_pb2 import MemorySettings
from torch import Tensor, nn

from model_runner.errors import BadInput
from model_runner.memory_builder.entries import GENERAL_SOURCE, entry_ids, origins_of
from model_runner.memory_builder.recipes import Preset
from model_runner.progress import Progress
from model_runner.router_hooks import Logits, Policy, RouterCall, RouterHooks
from model_runner.texts import Window, batched, make_batch

# Tokens of other text that are looked at for each null entry, and how many are enough for a longer step.
LOOKED_AT, ENOUGH = 8, 4


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
        answer, own = policy(call), call.router_logits.float()
        if answer is None:
            change = own.new_zeros(len(own))
        elif isinstance(answer, Logits):  # a sidecar's are on the CPU
            change = (answer.router_logits.to(own) - own).norm(dim=1)
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
    return torch.zeros_like(changes, dtype=torch.bool).index_fill(0, order[:count], True)


def windows_to_look_at(entries: int, windows: Sequence[Window]) -> int:
    """How many of these windows hold LOOKED_AT tokens for each of a layer's entries, all of them at most."""
    tokens = sum(window.targets for window in windows) / len(windows)
    return min(len(windows), math.ceil(LOOKED_AT * entries / tokens))


@dataclass(frozen=True, slots=True)
class Present:
    """What a memory holds of a source of null entries.

    Attributes:
        entries: in all layers.
        ids: in the last layer, which is written last.
        others: entries of that layer that are no null entries.

    """

    entries: int
    ids: frozenset[int]
    others: int

    def is_complete(self, looked_at: Sequence[Window], num_layers: int) -> bool:
        """Whether these are all that there can be of these windows, and of no other text."""
        wanted = min(self.others, sum(window.targets for window in looked_at))
        mine = self.ids.issubset(entry_ids(looked_at).tolist())
        return mine and self.entries == wanted * num_layers


def present(client: AdminClient, memory: str, source: str) -> Present:
    """Reads where the entries come from: about a second for 100,000."""
    sources = ListSourcesRequest(memory=memory)
    entries = sum(
        each.entries
        for reply in client.replies(client.admin.ListSources(sources), long=True)
        for each in reply.page.sources
        if each.source == source
    )
    ids, others = set[int](), 0
    for number, origin in origins_of(client, memory, client.describe(memory).layers[-1].layer):
        others += not origin.source.startswith(GENERAL_SOURCE)
        if origin.source == source:
            ids.add(number)
    return Present(entries, frozenset(ids), others)


def forget(client: AdminClient, memory: str, source: str) -> None:
    """Deletes a source's entries."""
    request = DeleteRequest(memory=memory, filter=EntryFilter(source=source))
    client.unary(client.retention.Delete, request, long=True, repeat=True)


@dataclass(frozen=True, slots=True)
class PresetStep:
    """The step of a memory, where it is its preset's: a short one without null entries, a longer one with them."""

    client: AdminClient
    memory: str
    preset: Preset
    num_layers: int

    def shorten(self) -> None:
        """To that without."""
        self._change(was=True, becomes=False)

    def lengthen(self) -> None:
        """To that with them."""
        self._change(was=False, becomes=True)

    @property
    def is_short(self) -> bool:
        """Whether it is that without, and another one with them."""
        return self._is(null_entries=False) and not self._is(null_entries=True)

    def _change(self, *, was: bool, becomes: bool) -> None:
        if self._is(null_entries=was) and not self._is(null_entries=becomes):
            step = MemorySettings(step_size=self._of_preset(null_entries=becomes))
            self.client.update_settings(self.memory, step)

    def _is(self, *, null_entries: bool) -> bool:
        stored = self.client.describe(self.memory).settings.step_size
        preset = self._of_preset(null_entries=null_entries)
        return len(stored) == len(preset) and all(map(math.isclose, stored, preset))

    def _of_preset(self, *, null_entries: bool) -> Sequence[float]:
        return self.preset.settings(self.num_layers, null_entries=null_entries).step_size
