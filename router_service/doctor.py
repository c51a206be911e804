"""Looks for what is wrong with a data directory or a running service. Reads files only; never opens the engine."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from shlex import quote

from router_service import __version__
from router_service.backends.base import Verifiable
from router_service.backends.disk import FreeSpace, is_open_to_others, storage_call
from router_service.backends.edge.files import CollectionFiles
from router_service.backends.edge.ledger import file_problems
from router_service.backends.qdrant_server.options import UNFINISHED
from router_service.errors import (
    CorruptMemory,
    DiskFull,
    NewerFormat,
    NewerSnapshot,
    SnapshotInvalid,
    StorageError,
)
from router_service.memories import known_keys, manifest
from router_service.memories.catalogue import DOOMED
from router_service.memories.manifest import (
    home_of,
    is_stray,
    is_unfinished,
    read_manifest,
    restored_directory,
)
from router_service.memories.memory import MemoryRecord, RoutingMemory, spec_of
from router_service.memories.settings import MemorySettings, Similarity
from router_service.memories.store import MemoryStore
from router_service.memories.unfinished_swaps import FileSwap, file_swaps
from router_service.snapshots import local
from router_service.snapshots import manifest as snapshot_manifest
from router_service.snapshots.files import check_listing
from router_service.snapshots.manifest import NAME, layer_directory

_ENGINE = "qdrant-edge-py"
_UPGRADE = "pip install --upgrade knn-moe"
# Below this many entries of a layer, comparing with every key is fast enough.
SMALL_LAYER = 5_000
# Share of a large layer's entries without an index from which on searches are slow.
UNINDEXED_SHARE = 0.25
# Of files without access: one line stays one line.
_MOST_NAMED = 3
# Directories of a data directory that are its owner's alone.
_PRIVATE = ("memories", "snapshots", "packs")


class Severity(StrEnum):
    """How bad a finding is; an error makes `doctor` fail."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor. `check` is its topic, `remedy` a command to run, or empty."""

    severity: Severity
    check: str
    what: str
    remedy: str = ""


Findings = Iterator[Finding]


def fine(check: str, what: str) -> Finding:
    """Nothing to do."""
    return Finding(Severity.OK, check, what)


def warning(check: str, what: str, remedy: str) -> Finding:
    """It works, though not as well as it could."""
    return Finding(Severity.WARNING, check, what, remedy)


def error(check: str, what: str, remedy: str) -> Finding:
    """It does not work."""
    return Finding(Severity.ERROR, check, what, remedy)


def diagnose_directory(data: Path, min_free_bytes: int | None, *, deep: bool) -> Findings:
    """Everything that files say. `min_free_bytes`: default max(1 GiB, 5 % of the file system)."""
    yield from check_versions()
    if not data.is_dir():
        remedy = f"router-service serve --data {quote(str(data))}"
        yield error(
            "data", f"{data}: " + ("not a directory" if data.exists() else "not there"), remedy
        )
        return
    try:
        holder = lock_holder(data / "memories")
        in_use = holder is not None
        yield check_lock(data, holder)
        yield check_space(data, min_free_bytes)
        yield from check_unfinished(data)
        yield from _check_files(data, in_use=in_use, deep=deep)
        yield from check_snapshots(data / "snapshots", deep=deep, in_use=in_use)
    except StorageError as failed:
        yield error("data", str(failed), f"ls -lR {quote(str(data))}")


def diagnose_store(store: MemoryStore, min_free_bytes: int | None, *, deep: bool) -> Findings:
    """What a running service says about itself and its files. Raises StorageError."""
    yield from check_versions()
    if store.directory is None:
        yield fine("data", store.location)
        for away in store.away():
            yield warning("nodes", f"{away}; start it again, the others serve meanwhile", "")
        try:
            if risk := store.at_risk():
                yield warning("copies", risk, "")
            yield from check_entries(store, deep=deep)
        except StorageError as failed:  # what is known of the nodes is said all the same
            yield error("data", str(failed), "")
        for memory in store.memories():
            yield from check_settings(memory.record)
        return
    yield from check_entries(store, deep=deep)
    data = store.directory.parent
    yield check_space(store.directory, min_free_bytes)
    with store.exclusive():  # no memory appears or goes meanwhile
        yield from _check_files(data, in_use=True, but=store.broken)
    yield from check_snapshots(data / "snapshots", deep=deep, in_use=True)


def _check_files(
    data: Path, *, in_use: bool, deep: bool = False, but: Collection[str] = ()
) -> Findings:
    with storage_call(f"read {data}"):
        yield from check_access(data)
        if (data / "memories").is_dir():
            yield from check_memories(data / "memories", in_use=in_use, deep=deep, but=but)


def check_versions() -> Findings:
    """Of this program, of its engine, and the formats that it reads."""
    yield fine("versions", f"knn-moe {__version__}")
    try:
        yield fine("versions", f"{_ENGINE} {metadata.version(_ENGINE)}")
    except metadata.PackageNotFoundError:
        yield error("versions", f"{_ENGINE} is not installed", _UPGRADE)
    formats = f"memory.json {manifest.FORMAT}, snapshots {snapshot_manifest.FORMAT}"
    yield fine("versions", f"reads and writes the formats: {formats}")


def lock_holder(memories: Path) -> str | None:
    """The process that serves the directory; None when there is none. Raises StorageError."""
    path = memories / "LOCK"
    if not path.exists():
        return None
    with storage_call(f"read {path}"), path.open() as file:
        try:
            # Shared and let go at once: nothing is written, and two doctors do not mind each other.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read(20).strip() or "unknown"
    return None


def check_unfinished(data: Path) -> Findings:
    """Writes to a Qdrant server that the next service goes on with. Raises StorageError."""
    for path in sorted(data.glob(f"{UNFINISHED}*")):
        if path.suffix:  # one that was being cut
            continue
        with storage_call(f"read {path}"), path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:  # a service's, which says so itself
                continue
            if size := os.fstat(file.fileno()).st_size:
                yield warning(
                    "writes",
                    f"{path}: {size} bytes of writes that a Qdrant server did not acknowledge, some replicas may lack "
                    "them; the next service with this --data and the same --backend finishes them",
                    f"router-service serve --data {quote(str(data))} --backend http://HOST:6334",
                )


def check_lock(data: Path, holder: str | None) -> Finding:
    """Whether a service runs on the directory."""
    if holder is None:
        return fine("lock", f"{data} is served by no process")
    return warning(
        "lock",
        f"{data} is served by process {holder}: what it is working on is not checked, nor what it holds in RAM",
        "router-admin doctor",
    )


def check_space(directory: Path, min_free_bytes: int | None) -> Finding:
    """Free disk against the minimum below which writes are refused."""
    free = f"{shutil.disk_usage(directory).free / 2**30:.1f} GiB free"
    try:
        FreeSpace(directory, min_free_bytes).require()
    except DiskFull as full:
        return error("disk", f"writes are refused: {full}", f"df -h {quote(str(directory))}")
    return fine("disk", f"{directory}: {free}")


def check_access(data: Path) -> Findings:
    """Whether this user can read every file and write to every directory, and no other user can."""
    remedy = f"chown -R $(id -un) {quote(str(data))}"
    directories, files = [data], list[Path]()
    for parent, below, names in os.walk(data):
        directories += [Path(parent, name) for name in below]
        files += [Path(parent, name) for name in names]
    closed = [path for path in directories if _denied(path, os.R_OK | os.X_OK)]
    closed += [path for path in files if _denied(path, os.R_OK)]
    fixed = [path for path in (*directories, *files) if _denied(path, os.W_OK)]
    if closed:
        yield error("access", f"cannot be read: {_named(closed)}", remedy)
    if fixed:
        yield error("access", f"cannot be written to: {_named(fixed)}", remedy)
    if not closed and not fixed:
        yield fine("access", f"{len(files)} files can be read and written")
    shared = [path for name in _PRIVATE if is_open_to_others(path := data / name)]
    if shared:
        yield warning(
            "access",
            f"other users can enter: {_named(shared)}; the next start of the service ends that",
            f"chmod go= {' '.join(quote(str(path)) for path in shared)}",
        )


def _denied(path: Path, mode: int) -> bool:
    """Files come and go while a service runs: one that is gone is not denied."""
    return not os.access(path, mode) and os.path.lexists(path)


def _named(paths: Iterable[Path]) -> str:
    names = [str(path) for path in paths]
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def check_memories(
    memories: Path, *, in_use: bool, deep: bool = False, but: Collection[str] = ()
) -> Findings:
    """Every memory `but` those; leftovers are not looked for `in_use`, when they may be work under way."""
    on_their_way = (
        [] if in_use else [move for move in file_swaps(memories) if move.home != move.origin]
    )
    yield from (_unfinished(move, memories) for move in on_their_way)
    hidden = {*but, *(move.origin.relative_to(memories).parts[0] for move in on_their_way)}
    paths = sorted(p for p in memories.iterdir() if p.is_dir() and p.name not in hidden)
    for path in paths:
        if path.name.endswith(DOOMED) or is_unfinished(path):
            if not in_use:
                yield _leftover(path.name, path, memories)
        else:
            yield from _check_memory(path, in_use=in_use, deep=deep)
    if not paths:
        yield fine("memories", f"{memories} holds no memory yet")


def _check_memory(path: Path, *, in_use: bool, deep: bool) -> Findings:
    try:
        record = read_manifest(path)
    except CorruptMemory as corrupt:
        later = isinstance(corrupt, NewerFormat)  # nothing is wrong with it
        yield error(path.name, str(corrupt), _UPGRADE if later else _set_aside(path))
        return
    problems = [
        finding
        for n in _layers(record)
        if (finding := _check_layer(path, record, n, deep=deep and not in_use))
    ]
    yield from problems
    if not problems:
        yield fine(path.name, f"manifest and {record.fingerprint.num_layers} layers agree")
    yield from check_settings(record)
    if not in_use:
        yield from map(_half_written, path.glob("*.partial"))
        yield from (_leftover(path.name, left, path.parent) for left in _leftovers(path, record))


def _check_layer(path: Path, record: MemoryRecord, layer: int, *, deep: bool) -> Finding | None:
    """What is wrong with the files of a layer; `deep`: with what they hold, of a service that was stopped."""
    files = _files(path, record, layer)
    spec = spec_of(record)
    try:
        shard = files.shard(files.require_spec(spec).generation)
        if not shard.is_dir():  # or the next generation has just taken over
            shard = files.shard(files.require_spec(spec).generation)
    except StorageError as failed:
        remedy = _UPGRADE if isinstance(failed, NewerFormat) else _restore(path)
        return error(path.name, f"layer {layer}: {failed}", remedy)
    if not shard.is_dir():
        return error(path.name, f"layer {layer}: CURRENT names {shard}, missing", _restore(path))
    if deep and (problems := file_problems(files)):
        return error(
            path.name, f"layer {layer}: {'; '.join(problems[:_MOST_NAMED])}", _restore(path)
        )
    return None


def _leftovers(path: Path, record: MemoryRecord) -> Iterator[Path]:
    """Files and directories of a memory that nothing leads to."""
    restored = restored_directory(path.parent, record)
    yield from (found for found in path.glob("restored-*") if is_stray(found, restored))
    known = {_files(path, record, layer).directory for layer in _layers(record)}
    home = path.parent / home_of(path.parent, record)
    yield from (
        found for parent in {path, home} for found in parent.glob("layer-*") if found not in known
    )
    for layer in _layers(record):
        yield from _unnamed(_files(path, record, layer))


def _unnamed(files: CollectionFiles) -> Iterator[Path]:
    """Generations that CURRENT does not name, and half-written files."""
    yield from files.directory.glob("*.partial")
    try:
        current = files.generation(files.read().generation)
    except StorageError:  # reported as an error of the layer
        return
    yield from (found for found in files.directory.glob("gen-*") if found != current)


def _half_written(path: Path) -> Finding:
    what = f"{path} was never finished; the next change of settings replaces it"
    return warning(path.parent.name, what, f"rm {quote(str(path))}")


def _unfinished(move: FileSwap, memories: Path) -> Finding:
    name = move.origin.relative_to(memories).parts[0]
    what = (
        f"{move.home} came from {move.origin}, and a crash cut that short; the next start ends it"
    )
    return warning(name, what, _start(memories))


def _leftover(memory: str, path: Path, memories: Path) -> Finding:
    return warning(
        memory, f"{path} is what a crash left behind; the next start removes it", _start(memories)
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


def check_settings(record: MemoryRecord) -> Findings:
    """A bandwidth that is still the default."""
    settings, untouched = record.settings, MemorySettings().gamma
    if settings.similarity is Similarity.RBF and set(settings.gamma) == set(untouched):
        yield warning(
            record.name,
            f"gamma is {untouched[0]:g} everywhere, the default: it was never calibrated to the model's distances",
            f"router-admin calibrate {quote(record.name)}",
        )


def check_entries(store: MemoryStore, *, deep: bool = False) -> Findings:
    """Every memory that serves, and the reasons of those that do not. `deep`: every entry is compared first."""
    for memory in store.latest():
        if deep:
            yield from _compare(memory)
        yield from check_known_keys(memory)
    for name, reason in sorted(store.broken.items()):
        yield error(
            name,
            f"set aside when the service started: {reason}",
            _UPGRADE
            if isinstance(reason, NewerFormat)
            else f"router-admin snapshot restore {quote(name)} SNAPSHOT --replace",
        )
    with store.exclusive():  # a memory that is being deleted has no counts
        for memory in store.latest():
            yield from _check_served_memory(memory, indexed=store.directory is not None)


def check_known_keys(memory: RoutingMemory) -> Findings:
    """Whether lookups find a sample of each layer's own keys. Raises StorageError when that cannot be asked."""
    name, sound = memory.record.name, [each for each in memory.layers if not each.info().damage]
    for failure in known_keys.failures(name, sound, memory.record.settings):
        if not isinstance(failure, CorruptMemory):
            raise failure
        yield error(
            name,
            str(failure),
            f"router-admin snapshot restore {quote(name)} SNAPSHOT --replace  # on storage that keeps its files",
        )


def _compare(memory: RoutingMemory) -> Findings:
    """Whether the entries are what was written; a layer that is set apart already is found by its info."""
    compared = 0
    for layer in memory.layers:
        info = layer.info()
        if isinstance(layer.collection, Verifiable) and not info.damage:
            try:
                layer.collection.verify()
            except CorruptMemory:  # it is set apart now, and says so
                continue
            compared += info.entries
    if compared:
        yield fine(memory.record.name, f"{compared} entries compared: they are what was written")


def _check_served_memory(memory: RoutingMemory, *, indexed: bool) -> Findings:
    """`indexed`: whether the backend builds indexes at all."""
    record = memory.record
    yield from _check_writes(memory)
    read = [layer for layer in memory.layers if record.settings.speaks_for(layer.layer)]
    infos = {layer.layer: layer.info() for layer in read}
    for number in [number for number, info in infos.items() if info.damage]:
        yield error(
            record.name,
            f"layer {number}: {infos.pop(number).damage}",
            f"router-admin snapshot restore {quote(record.name)} SNAPSHOT --replace",
        )
    if not infos:
        return
    empty = [number for number, info in infos.items() if not info.entries]
    slow = [
        number
        for number, info in infos.items()
        if indexed
        and info.entries >= SMALL_LAYER
        and info.entries - info.indexed_entries > UNINDEXED_SHARE * info.entries
    ]
    if empty:
        yield _empty(memory, empty, sorted(infos.keys() - set(empty)))
    if slow:
        yield _unindexed(memory, slow)
    if not empty and not slow:
        entries = sum(info.entries for info in infos.values())
        yield fine(record.name, f"{entries} entries in {len(infos)} layers")


def _check_writes(memory: RoutingMemory) -> Findings:
    """What a server has not acknowledged."""
    name = memory.record.name
    for layer in memory.layers:
        if (found := layer.info().unfinished) is not None:
            ids = _listed(found.ids[:_MOST_NAMED])
            more = len(found.ids) - _MOST_NAMED
            lasting = "" if found.on_disk else "; without --data a stop of the service ends that"
            yield warning(
                name,
                f"layer {layer.layer}: {found.writes} writes of {len(found.ids)} entries (ids {ids}"
                f"{f' and {more} more' if more > 0 else ''}) are not acknowledged, some replicas may lack them; they "
                f"are sent again until they are{lasting} ({found.problem})",
                "router-admin doctor, when the nodes of the Qdrant server are whole",
            )


def _empty(memory: RoutingMemory, empty: list[int], filled: list[int]) -> Finding:
    name = quote(memory.record.name)
    if not filled:
        return warning(
            name, "holds no entries: it answers nothing", f"router-admin import FILE --into {name}"
        )
    layers = ",".join(map(str, filled))
    return warning(
        name,
        f"layers {_listed(empty)} hold no entries: the model's own router stands there",
        f"router-admin memory set {name} --layers {layers}",
    )


def _unindexed(memory: RoutingMemory, slow: list[int]) -> Finding:
    return warning(
        memory.record.name,
        f"layers {_listed(slow)} have {SMALL_LAYER} entries or more, and over {UNINDEXED_SHARE:.0%} without an index",
        f"router-admin optimize {quote(memory.record.name)}",
    )


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def check_snapshots(directory: Path, *, deep: bool, in_use: bool) -> Findings:
    """Every snapshot; ones that were never finished are not looked for `in_use`, when one may be under way.

    Raises StorageError.
    """
    with storage_call(f"read {directory}"):
        for home in sorted(path for path in directory.glob("*") if path.is_dir()):
            found = sorted(path for path in home.iterdir() if path.is_dir())
            for path in found:
                if NAME.fullmatch(path.name):
                    yield from _check_snapshot(path, deep)
            if not in_use:
                yield from map(_unfinished_snapshot, home.glob(".partial-*"))


def _check_snapshot(path: Path, deep: bool) -> Findings:
    """None of one that was deleted meanwhile, which takes its name from it at one moment."""
    topic = f"snapshot {path.parent.name}/{path.name}"
    try:
        if deep:
            entries = local.verify(path).entries
        else:
            manifest = snapshot_manifest.read_manifest(path)
            check_listing(path, manifest)
            entries = sum(manifest.entries)
    except (SnapshotInvalid, StorageError) as failed:
        if not path.is_dir():
            return
        if not isinstance(failed, SnapshotInvalid):
            raise
        remedy = _UPGRADE if isinstance(failed, NewerSnapshot) else f"rm -r {quote(str(path))}"
        yield error(topic, str(failed), remedy)
        return
    yield fine(
        topic, f"{entries} entries; " + ("every sum is right" if deep else "all files there")
    )


def _unfinished_snapshot(path: Path) -> Finding:
    memory = path.parent.name
    return warning(
        f"snapshot {memory}",
        f"{path} was never finished; the next snapshot or list removes it",
        f"router-admin snapshot list {quote(memory)}",
    )
