"""Which memories a migration moves, checked before anything is written, and one of them moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from knnmoe.v1 import types_pb2 as types_pb

from router_service.cli.errors import AdminError, BadInput
from router_service.cli.places import PlaceName
from router_service.cli.same_memory import require_same_entries
from router_service.errors import shorten
from router_service.memories.memory import MemoryRecord
from router_service.memories.settings import MemorySettings
from router_service.rpc import codec
from router_service.transfer import LayerIndex, Migration, Outcome, Place, Untouched, bring_indexes
from router_service.transfer.moving import Progress

_NAMES_TOLD = 20


@dataclass(frozen=True, slots=True)
class Ends:
    """Both places, opened, and what the user calls them."""

    source: Place
    target: Place
    source_name: PlaceName
    target_name: PlaceName


@dataclass(slots=True)
class Move:
    """One memory's move, and what became of it. `changed_settings` are those that the target's had otherwise."""

    record: MemoryRecord
    as_name: str
    made: bool
    migration: Migration | None = None
    outcome: Outcome | None = None
    changed_settings: list[str] = field(default_factory=list)
    indexes: list[LayerIndex] = field(default_factory=list)


def wanted_records(
    source: Place, source_name: PlaceName, names: Sequence[str]
) -> list[MemoryRecord]:
    """The memories of these names, each once, or all that the source holds. Raises AdminError."""
    wanted = list(dict.fromkeys(names)) or source.names()
    if not wanted:
        raise BadInput(f"nothing to move: {shorten(source_name.text)} holds no memories")
    return [_found(source, source_name, name) for name in wanted]


def checked_moves(ends: Ends, records: Sequence[MemoryRecord], as_name: str | None) -> list[Move]:
    """What to do. Raises BadInput unless the target can take every one."""
    return [_checked(ends, record, as_name or record.name) for record in records]


def move_memory(
    ends: Ends, move: Move, progress: Progress, *, delete: bool, optimize: bool
) -> None:
    """Makes the target's memory that of the source. Raises AdminError or RoutingServiceError; see Migration.run."""
    name, record = move.as_name, move.record
    if move.made:
        ends.target.create(name, record.fingerprint, record.settings)
    bring_settings(ends, move)
    source, target = ends.source.side(record.name), ends.target.side(name)
    layers = record.fingerprint.num_layers
    move.migration = Migration(source, target, layers, delete)
    move.outcome = move.migration.run(progress)
    bring_settings(ends, move)  # they may have changed meanwhile
    if move.outcome.verified:
        move.indexes = bring_indexes(source, target, layers, progress, optimize=optimize)


def look_at_memory(ends: Ends, move: Move, progress: Progress, *, delete: bool) -> None:
    """What move_memory() would do first; writes nothing. Raises as move_memory()."""
    target = Untouched(None if move.made else ends.target.side(move.as_name))
    source = ends.source.side(move.record.name)
    move.migration = Migration(source, target, move.record.fingerprint.num_layers, delete)
    move.migration.one_pass(progress, "comparing")
    if not move.made:
        move.changed_settings = _differing(ends, move)


def bring_settings(ends: Ends, move: Move) -> None:
    """Lets the target's memory be read as the source's is now."""
    differing = _differing(ends, move)
    if differing:
        ends.target.change_settings(
            move.as_name, _found(ends.source, ends.source_name, move.record.name).settings
        )
        move.changed_settings = sorted({*move.changed_settings, *differing})


def _differing(ends: Ends, move: Move) -> list[str]:
    source, target = (
        _found(ends.source, ends.source_name, move.record.name),
        ends.target.record(move.as_name),
    )
    if target is None:
        raise AdminError(
            f"memory {shorten(move.as_name)} is gone from {shorten(ends.target_name.text)}; deleted meanwhile?"
        )
    layers = source.fingerprint.num_layers
    wanted, have = _fields(source.settings, layers), _fields(target.settings, layers)
    return [name for name in wanted if wanted[name] != have[name]]


def _fields(settings: MemorySettings, layers: int) -> dict[str, object]:
    """Field by field; all layers listed is the same as none."""
    fields = settings.fields()
    if set(settings.layers) == set(range(layers)):
        fields["layers"] = ()
    return fields


def _found(source: Place, source_name: PlaceName, name: str) -> MemoryRecord:
    record = source.record(name)
    if record is None:
        known = ", ".join(source.names()[:_NAMES_TOLD]) or "none"
        place = shorten(source_name.text)
        raise AdminError(f"memory {shorten(name)} not found in {place}, which has: {known}")
    return record


@dataclass(frozen=True, slots=True)
class _Described:
    """A record as the contract says it."""

    fingerprint: types_pb.ModelFingerprint
    settings: types_pb.MemorySettings

    @staticmethod
    def of(record: MemoryRecord) -> _Described:
        """Field by field."""
        return _Described(
            codec.encode_fingerprint(record.fingerprint), codec.encode_settings(record.settings)
        )


def _checked(ends: Ends, record: MemoryRecord, as_name: str) -> Move:
    there = ends.target.record(as_name)
    if there is None:
        return Move(record, as_name, made=True)
    left = f"memory {record.name} in {ends.source_name.text}"
    right = f"memory {as_name} in {ends.target_name.text}"
    require_same_entries(left, _Described.of(record), right, _Described.of(there))
    one, other = record.settings.preset, there.settings.preset
    if one != other:
        raise BadInput(
            f"{left} has preset {one}, {right} {other}, which is fixed at creation; pass --as NAME"
        )
    return Move(record, as_name, made=False)
