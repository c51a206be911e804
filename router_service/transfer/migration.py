"""One memory made the same at another endpoint: its settings, its entries, and what its searches are made of."""

from __future__ import annotations

from dataclasses import dataclass, field

from router_service.backends.base import Compression
from router_service.errors import shorten
from router_service.memories.memory import MemoryRecord
from router_service.memories.settings import MemorySettings
from router_service.transfer.copying import Copy, differing
from router_service.transfer.endpoints import (
    Endpoint,
    MemoryEntries,
    MemoryGone,
    Progress,
    Untouched,
)


@dataclass(frozen=True, slots=True)
class LayerIndex:
    """What became of one layer's search keys. `refused`: why the target cannot have those of the source, or empty."""

    layer: int
    source: Compression
    target: Compression
    optimized: bool
    refused: str = ""


@dataclass(slots=True)
class Migration:
    """One memory's way to the target, and what became of it. `made`: the target had none of that name.

    `changed_settings` are those that the target's had otherwise. `unfound`: what lookups do not find there, and why.
    """

    source: Endpoint
    target: Endpoint
    record: MemoryRecord
    as_name: str
    made: bool
    copy: Copy = field(init=False)
    changed_settings: list[str] = field(default_factory=list)
    indexes: list[LayerIndex] = field(default_factory=list)
    unfound: str = ""

    @property
    def verified(self) -> bool:
        """Whether the target's memory is the source's, and its lookups find what it holds."""
        return self.copy.verified and not self.unfound

    def run(self, progress: Progress, *, delete: bool, optimize: bool) -> None:
        """Makes the target's memory that of the source. Raises what the endpoints raise; see Copy.run.

        One that was made here, and whose lookups do not find what it holds, is removed again.
        """
        record = self.record
        if self.made:
            self.target.create(self.as_name, record.fingerprint, record.settings)
        self._copy_settings()
        source = self.source.entries(record.name)
        target = self.target.entries(self.as_name)
        layers = range(record.fingerprint.num_layers)
        self.copy = Copy(source, target, layers, differing, delete=delete, verify=True)
        self.copy.run(progress)
        self._copy_settings()  # they may have changed meanwhile
        if self.copy.verified:
            self.indexes = copy_indexes(source, target, len(layers), progress, optimize=optimize)
            self.unfound = target.unfound()
        if self.unfound and self.made:
            self.target.delete(self.as_name)

    def look(self, progress: Progress, *, delete: bool) -> None:
        """What run() would do first; writes nothing. Raises what the endpoints raise."""
        target = Untouched(None if self.made else self.target.entries(self.as_name))
        source = self.source.entries(self.record.name)
        layers = range(self.record.fingerprint.num_layers)
        self.copy = Copy(source, target, layers, differing, delete=delete)
        self.copy.one_pass(progress, "comparing")
        if not self.made:
            self.changed_settings = self._differing_settings()

    def _copy_settings(self) -> None:
        """Lets the target's memory be read as the source's is now."""
        differing_settings = self._differing_settings()
        if differing_settings:
            wanted = self.source.record(self.record.name).settings
            self.target.change_settings(self.as_name, wanted)
            self.changed_settings = sorted({*self.changed_settings, *differing_settings})

    def _differing_settings(self) -> list[str]:
        source = self.source.record(self.record.name)
        target = self.target.find(self.as_name)
        if target is None:
            raise MemoryGone(
                f"memory {shorten(self.as_name)} is gone from {shorten(self.target.label)}; deleted meanwhile?"
            )
        layers = source.fingerprint.num_layers
        wanted, have = _fields(source.settings, layers), _fields(target.settings, layers)
        return [name for name in wanted if wanted[name] != have[name]]


def _fields(settings: MemorySettings, layers: int) -> dict[str, object]:
    """By name; all layers listed is the same as none."""
    fields = settings.fields()
    if set(settings.layers) == set(range(layers)):
        fields["layers"] = ()
    return fields


def copy_indexes(
    source: MemoryEntries, target: MemoryEntries, layers: int, progress: Progress, *, optimize: bool
) -> list[LayerIndex]:
    """Optimizes the target's layers where the source has an index or compression that they lack.

    Without `optimize` only says what they have. What `progress` raises as it advances ends it.
    """
    with progress("optimizing", layers) as advance:
        done = []
        for layer in range(layers):
            wanted, have, refused = source.state(layer), target.state(layer), ""
            behind = bool(wanted.indexed_entries) and have.indexed_entries < have.entries
            lacks = optimize and (behind or have.compression != wanted.compression)
            if lacks:
                refused = target.optimize(layer, wanted.compression, lambda *_: advance(0))
                have = target.state(layer)
            made = lacks and not refused
            done.append(LayerIndex(layer, wanted.compression, have.compression, made, refused))
            advance(1)
        return done
