"""The memories of a data directory: manifests, the files that they lead to, and what crashes left behind."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from shlex import quote

from router_service.backends.base import CollectionSpec
from router_service.backends.edge_files import CollectionFiles
from router_service.catalogue import DOOMED
from router_service.doctor.findings import Finding, Findings, error, fine, warning
from router_service.doctor.settings import check_settings
from router_service.errors import CorruptMemory, StorageError
from router_service.maintenance.moved_memories import Move, moves
from router_service.maintenance.restored_files import home_of, is_stray, restored_directory
from router_service.maintenance.snapshot_manifest import layer_directory
from router_service.manifest import is_unfinished, read_manifest
from router_service.routing_memory import MemoryRecord


def check_memories(memories: Path, *, in_use: bool, but: Collection[str] = ()) -> Findings:
    """Every memory `but` those; leftovers are not looked for `in_use`, when they may be work under way."""
    on_their_way = [] if in_use else [move for move in moves(memories) if move.home != move.origin]
    yield from (_unfinished(move, memories) for move in on_their_way)
    hidden = {*but, *(move.origin.relative_to(memories).parts[0] for move in on_their_way)}
    paths = sorted(p for p in memories.iterdir() if p.is_dir() and p.name not in hidden)
    for path in paths:
        if path.name.endswith(DOOMED) or is_unfinished(path):
            if not in_use:
                yield _leftover(path.name, path, memories)
        else:
            yield from _check_memory(path, in_use=in_use)
    if not paths:
        yield fine("memories", f"{memories} holds no memory yet")


def _check_memory(path: Path, *, in_use: bool) -> Findings:
    try:
        record = read_manifest(path)
    except CorruptMemory as corrupt:
        yield error(path.name, str(corrupt), _set_aside(path))
        return
    problems = [finding for n in _layers(record) if (finding := _check_layer(path, record, n))]
    yield from problems
    if not problems:
        yield fine(path.name, f"manifest and {record.fingerprint.num_layers} layers agree")
    yield from check_settings(record)
    if not in_use:
        yield from map(_half_written, path.glob("*.partial"))
        yield from (_leftover(path.name, left, path.parent) for left in _leftovers(path, record))


def _check_layer(path: Path, record: MemoryRecord, layer: int) -> Finding | None:
    """What is wrong with the files of a layer."""
    files = _files(path, record, layer)
    spec = CollectionSpec(
        record.fingerprint.hidden_size, record.settings.similarity.metric, record.value_width
    )
    try:
        shard = files.shard(files.require_spec(spec).generation)
        if not shard.is_dir():  # or the next generation has just taken over
            shard = files.shard(files.require_spec(spec).generation)
    except StorageError as failed:
        return error(path.name, f"layer {layer}: {failed}", _restore(path))
    if not shard.is_dir():
        return error(path.name, f"layer {layer}: CURRENT names {shard}, missing", _restore(path))
    return None


def _leftovers(path: Path, record: MemoryRecord) -> Iterator[Path]:
    """Files and directories of a memory that nothing leads to."""
    restored = restored_directory(path.parent, record)
    yield from (found for found in path.glob("restored-*") if is_stray(found, restored))
    known = {_files(path, record, layer).directory for layer in _layers(record)}
    home = path.parent / home_of(path.parent, record)
    yield from (
        found for place in {path, home} for found in place.glob("layer-*") if found not in known
    )
    for layer in _layers(record):
        yield from _unnamed(_files(path, record, layer))


def _unnamed(files: CollectionFiles) -> Iterator[Path]:
    """Generations that CURRENT does not name, and half-written files."""
    yield from files.directory.glob("*.partial")
    try:
        current = files.generation(files.read().generation)
    except StorageError:  # told as an error of the layer
        return
    yield from (found for found in files.directory.glob("gen-*") if found != current)


def _half_written(path: Path) -> Finding:
    what = f"{path} was never finished; the next change of settings replaces it"
    return warning(path.parent.name, what, f"rm {quote(str(path))}")


def _unfinished(move: Move, memories: Path) -> Finding:
    name = move.origin.relative_to(memories).parts[0]
    what = (
        f"{move.home} came from {move.origin}, and a crash cut that short; the next start ends it"
    )
    return warning(name, what, _start(memories))


def _leftover(memory: str, path: Path, memories: Path) -> Finding:
    return warning(
        memory,
        f"{path} is what a crash left behind; the next start removes it",
        _start(memories),
    )


def _start(memories: Path) -> str:
    return f"router-service serve --data {quote(str(memories.parent))}"


def _files(path: Path, record: MemoryRecord, layer: int) -> CollectionFiles:
    return CollectionFiles(path.parent, f"{home_of(path.parent, record)}/{layer_directory(layer)}")


def _layers(record: MemoryRecord) -> range:
    return range(record.fingerprint.num_layers)


def _set_aside(path: Path) -> str:
    aside = path.parent.parent / f"{path.name}.broken"
    return f"mv {quote(str(path))} {quote(str(aside))}"


def _restore(path: Path) -> str:
    restore = f"router-admin snapshot restore {quote(path.name)} SNAPSHOT --replace"
    return f"{restore}  # or set it aside: {_set_aside(path)}"
