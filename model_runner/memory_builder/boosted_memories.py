"""Boosting of a memory in the sidecar: rounds in RAM, each kept beside the memory until one takes its place.

After round k the memory NAME.round-k holds it; NAME answers lookups as before, and is replaced in one moment at the
end. A run that was cut off goes on from the last round that is there in whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from knnmoe import tensors
from knnmoe.client import AdminClient, ExampleRef
from knnmoe.v1 import memory_admin_pb2 as pb
from knnmoe.v1.routing_pb2 import MemoryDescription
from knnmoe.v1.types_pb2 import MEMORY_KIND_LOGIT_DELTA, MemorySettings
from torch import Tensor

from model_runner.errors import BadInput, RunnerError
from model_runner.memory_builder.boosting import (
    Boosted,
    Booster,
    Deltas,
    Outcome,
    verdict,
)
from model_runner.memory_builder.entries import (
    Destination,
    LayerEntries,
    entry_ids,
    upsert_requests,
)
from model_runner.progress import Progress
from model_runner.texts import Window, batched
from model_runner.wire import decode_floats

# Gammas that differ by less were calibrated on the same text; relative.
SAME_SETTINGS = 1e-3

U64 = np.ndarray[tuple[int], np.dtype[np.uint64]]


class MemoryChanged(RunnerError):
    """A memory was written to while it was boosted."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A memory that was read: as it was described, and of each layer the ids u64 [n] and the entries, in one order."""

    described: MemoryDescription
    ids: list[U64]
    layers: list[Deltas]


class RoundMemories:
    """The rounds of one memory's boosting, each a memory beside it.

    Args:
        client: of the sidecar.
        destination: the memory, which holds logit deltas, and how its entries are written.
        device: where entries are held.

    """

    def __init__(self, client: AdminClient, destination: Destination, device: torch.device) -> None:
        self._client, self._to, self._device = client, destination, device
        self.memory = destination.memory

    def name(self, rounds: int) -> str:
        """Of the memory after so many rounds of this run."""
        return f"{self.memory}.round-{rounds}"

    def described(self, most: int) -> MemoryDescription:
        """The memory as it is. Raises BadInput when it cannot be boosted, or not so often."""
        if most < 1:
            raise BadInput(f"rounds: got {most}, expected 1 or more")
        now = self._client.describe(self.memory)
        if now.settings.kind != MEMORY_KIND_LOGIT_DELTA:
            raise BadInput(
                f"memory {self.memory!r} holds no logit deltas, which rounds boost; build one with --preset boosted"
            )
        return now

    def latest(self, now: MemoryDescription, most: int, ids: U64) -> MemoryDescription:
        """The last round that goes on from the memory as it is now, or it itself; what else there is of rounds goes.

        ids: of the reference's entries.
        """
        found, last = now, now.layers[-1].layer
        for rounds in range(now.settings.rounds + 1, most + 1):
            there = self._found(rounds)
            if there is None:
                continue
            held = [self._client.count(each.name, last, ids) for each in (now, there)]
            if _goes_on(now, there) and held[0] == held[1]:
                found = there
            else:
                self._client.delete(there.name)
        return found

    def drop(self, rounds: range) -> None:
        """Removes those that are there."""
        for number in rounds:
            if self._found(number) is not None:
                self._client.delete(self.name(number))

    def _found(self, rounds: int) -> MemoryDescription | None:
        """The memory of a round. Raises BadInput where another one has its name."""
        there = self._client.find(self.name(rounds))
        if there is not None and there.settings.rounds != rounds:
            raise BadInput(
                f"memory {there.name!r} is no round of boosting, and has the name of one: remove it, or boost a memory "
                "of another name"
            )
        return there

    def read(self, described: MemoryDescription, progress: Progress) -> Stored:
        """All entries of a memory."""
        read = [
            self._layer(described.name, layer.layer)
            for layer in progress.track(described.layers, "reading the memory", "layers")
        ]
        return Stored(described, [ids for ids, _ in read], [layer for _, layer in read])

    def _layer(self, name: str, layer: int) -> tuple[U64, Deltas]:
        ids, keys, deltas, origins = list[U64](), list[Tensor](), list[Tensor](), list[ExampleRef]()
        refs: dict[tuple[str, str], ExampleRef] = {}
        for entries in self._pages(pb.ExportRequest(memory=name, layer=layer)):
            ids.append(tensors.to_array(entries.ids))
            keys.append(decode_floats(entries.keys).float())
            deltas.append(decode_floats(entries.logit_deltas).float())
            for origin in entries.provenance:
                named = origin.source, origin.example
                origins.append(refs.setdefault(named, ExampleRef(*named)))
        if not ids:
            raise BadInput(f"memory {name!r}: layer {layer} is empty, expected entries to boost")
        return np.concatenate(ids), Deltas(
            torch.cat(keys).to(self._device), torch.cat(deltas).to(self._device), origins
        )

    def write(self, of: Stored, state: Boosted, progress: Progress) -> None:
        """A memory after a round, with the provenance that the entries have now."""
        name = self.name(state.rounds)
        self.drop(range(state.rounds, state.rounds + 1))
        settings = MemorySettings()
        settings.CopyFrom(of.described.settings)
        settings.rounds, settings.round_nll[:] = state.rounds, state.nll
        if settings.search_recall:  # was measured for the keys before
            for field in ("search_recall", "exact_layers", "hnsw_ef", "oversampling"):
                settings.ClearField(field)
        self._client.find_or_create(name, of.described.fingerprint, settings)
        to = replace(self._to, memory=name)
        with self._client.upserter() as upserter:
            for number in progress.track(range(len(of.ids)), f"writing {name}", "layers"):
                for entries in self._pages_after(of, state, number):
                    for request in upsert_requests(entries, to):
                        upserter.send(request)
            upserter.finish()

    def _pages_after(self, of: Stored, state: Boosted, number: int) -> Iterator[LayerEntries]:
        order, layer = np.argsort(of.ids[number]), state.layers[number]
        at = of.described.layers[number].layer
        request = pb.ExportRequest(memory=self.memory, layer=at, without_keys=True)
        for entries in self._pages(request):
            ids = tensors.to_array(entries.ids)
            rows = _rows(of.ids[number], order, ids)
            if (rows < 0).any():
                raise self._changed()
            found = torch.from_numpy(rows).to(layer.keys.device)
            yield LayerEntries(
                at, ids, layer.keys[found], layer.deltas[found], list(entries.provenance)
            )

    def _pages(self, request: pb.ExportRequest) -> Iterator[pb.Entries]:
        for reply in self._client.replies(self._client.admin.Export(request), long=True):
            if reply.entries.provenance:
                yield reply.entries

    def put_in_place(self, of: Stored, outcome: Outcome) -> None:
        """The memory has the entries of the kept round from one lookup to the next. Raises MemoryChanged."""
        now = self._client.describe(self.memory)
        if [layer.entries for layer in now.layers] != [len(ids) for ids in of.ids]:
            raise self._changed()
        own = outcome.rounds == now.settings.rounds
        name = self.memory if own else self.name(outcome.rounds)
        self._client.update_settings(
            name, MemorySettings(rounds=outcome.rounds, round_nll=outcome.nll)
        )
        if not own:
            request = pb.ReplaceMemoryRequest(memory=self.memory, by=name)
            self._client.unary(self._client.admin.ReplaceMemory, request, long=True)

    def _changed(self) -> MemoryChanged:
        return MemoryChanged(
            f"memory {self.memory!r} was written to while it was boosted, and stays as it is; run this again: boosting "
            "begins anew, with what it holds then"
        )


def rows_of(stored: Stored, windows: Sequence[Window], batch_size: int) -> list[Tensor]:
    """Of each layer the row int64 [m] of the entry of each token, as Booster takes them; -1: there is none."""
    ids = np.concatenate([entry_ids(group) for group in batched(windows, batch_size)])
    return [
        torch.from_numpy(_rows(of_layer, np.argsort(of_layer), ids)).to(layer.keys.device)
        for of_layer, layer in zip(stored.ids, stored.layers, strict=True)
    ]


def _rows(stored: U64, order: np.ndarray, ids: U64) -> np.ndarray:
    """Where each of `ids` is in `stored`, which `order` sorts; -1: nowhere."""
    found = order[np.searchsorted(stored, ids, sorter=order).clip(max=len(stored) - 1)]
    return np.where(stored[found] == ids, found, -1)


def _goes_on(now: MemoryDescription, there: MemoryDescription) -> bool:
    """Whether a round is whole, and is of the memory's entries and settings."""
    ours, theirs = now.settings, there.settings
    near = all(
        len(getattr(ours, name)) == len(getattr(theirs, name))
        and np.allclose(getattr(ours, name), getattr(theirs, name), rtol=SAME_SETTINGS, atol=0)
        for name in ("gamma", "step_size")
    )
    same = all(
        getattr(ours, name) == getattr(theirs, name)
        for name in ("neighbours", "null_weight", "min_lambda", "layers")
    )
    counts = ([layer.entries for layer in each.layers] for each in (now, there))
    return near and same and next(counts) == next(counts) and now.model_digest == there.model_digest


def boost_memory(
    rounds: RoundMemories,
    windows: Sequence[Window],
    booster_of: Callable[[Stored], Booster],
    most: int,
    progress: Progress,
    *,
    least_fall: float,
    finish: Callable[[str], object],
) -> Outcome:
    """Boosts a memory until it has been through `most` rounds, or its leave-one-out NLL says that it is enough.

    windows: of the reference. booster_of: goes over them with what was read, and stops by `least_fall`.
    finish: gets the name of the memory that takes its place, before it does, e.g. to index it.
    Raises BadInput for another kind of values, or fewer than one round; MemoryChanged.
    """
    now = rounds.described(most)
    before, nll = now.settings.rounds, tuple(now.settings.round_nll)
    if before and len(nll) == before + 3 and (why := verdict(nll, least_fall)):
        return Outcome(before, nll, f"{why}, before this run")
    if before >= most:
        return Outcome(before, nll, "as many as asked for, before this run")
    stored = rounds.read(rounds.latest(now, most, entry_ids(windows)), progress)
    settings = stored.described.settings
    start = Boosted(
        stored.layers,
        settings.rounds,
        tuple(settings.round_nll)[: settings.rounds + 1] if settings.rounds else (),
    )

    def keep(state: Boosted) -> None:
        rounds.write(stored, state, progress)
        rounds.drop(range(state.rounds - 2, state.rounds - 1))  # the one before may yet be the best

    outcome = booster_of(stored).run(start, most, progress, keep)
    outcome = replace(outcome, rounds=max(before, outcome.rounds))
    if outcome.rounds > before:
        finish(rounds.name(outcome.rounds))
    rounds.put_in_place(stored, outcome)
    rounds.drop(range(before + 1, most + 1))
    return outcome
