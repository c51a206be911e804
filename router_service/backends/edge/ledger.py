"""What the service itself knows of the entries that it gave the engine, to compare with what the engine has.

    gen-NNNNNN/values.npz   id, value row and digests of every entry; there only while the shard has exactly these
    gen-NNNNNN/base.npz     the same, as it was before the writes that writes.log has
    gen-NNNNNN/writes.log   there while the collection is open, and after an unclean stop: each write, before it is made
    gen-NNNNNN/sums.json    SHA-256 of the shard's files: of those that never change again; after a close, of all

Digests are those of arrays.digests_of(). 0: not known.
"""

from __future__ import annotations

import json
import os
import struct
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import numpy as np

from router_service.arrays import U64
from router_service.backends.disk import (
    Content,
    fsync_directory,
    read_content,
    storage_call,
    write_atomically,
)
from router_service.backends.edge.files import CollectionFiles
from router_service.errors import CorruptMemory

# Of a key or a payload that the engine cannot read; BLAKE2b gives it once in 2^64.
UNREADABLE = np.uint64(2**64 - 1)
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_MOST_NAMED = 5


class Kind(IntEnum):
    """What a record of the log says; OPENED is the first: the machine's boot, and the entries there were before."""

    OPENED = 1
    UPSERT = 2
    DELETE = 3
    DONE = 4  # the write before it was made
    FLUSHED = 5  # all writes that were done survive loss of power


_HEAD = struct.Struct("<III")  # kind, bytes that follow, CRC-32 of them
_SUM = struct.Struct("<I")  # CRC-32 of the head
_WRITES = np.dtype([("id", "<u8"), ("digests", "<u8", (2,))])


class WriteLog:
    """The log of an open collection. Called by who holds its writes, but for sync() and flushed()."""

    def __init__(self, path: Path, entries: int) -> None:
        """A new log of a table of so many entries, durable, in the place of one that is there. Raises StorageError."""
        self._path, self._lock = path, threading.Lock()
        begun = path.with_name(f"{path.name}.partial")
        with storage_call(f"write {path}"):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
            self._file = os.open(begun, flags, 0o600)
            try:
                self._append(Kind.OPENED, f"{_boot()} {entries}".encode())
                os.fsync(self._file)
                begun.rename(path)  # it never is there without its first record
                fsync_directory(path.parent)
            except BaseException:
                self.close()
                raise

    @property
    def size_bytes(self) -> int:
        """Bytes that it has grown to."""
        return os.fstat(self._file).st_size

    @property
    def removed(self) -> bool:
        """Whether its file was deleted meanwhile, and all else of the collection with it."""
        return os.fstat(self._file).st_nlink == 0

    def begin(self, ids: U64, digests: U64 | None, *, durable: bool) -> None:
        """Before entries are written, with their digests [n, 2], or deleted.

        `durable`: for what takes something away, so that after loss of power it is known that it may be gone.
        """
        body = np.zeros(len(ids), _WRITES)
        body["id"] = ids
        if digests is not None:
            body["digests"] = digests
        with storage_call(f"write {self._path}"):
            self._append(Kind.DELETE if digests is None else Kind.UPSERT, body.tobytes())
            if durable:
                os.fdatasync(self._file)

    def done(self) -> None:
        """The engine has made all of the write that began."""
        with storage_call(f"write {self._path}"):
            self._append(Kind.DONE, b"")

    def sync(self) -> None:
        """Before a flush of the engine."""
        with storage_call(f"sync {self._path}"):
            os.fdatasync(self._file)

    def flushed(self) -> None:
        """After a flush of the engine."""
        with storage_call(f"write {self._path}"):
            self._append(Kind.FLUSHED, b"")

    def close(self) -> None:
        """Closes the file and leaves it there. Closing twice is allowed."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _append(self, kind: Kind, body: bytes) -> None:
        """A whole record or nothing: on a full disk too."""
        head = _HEAD.pack(kind, len(body), zlib.crc32(body))
        record = head + _SUM.pack(zlib.crc32(head)) + body
        with self._lock:  # writes and flushes come from two threads
            size = self.size_bytes
            try:
                while record:
                    record = record[os.write(self._file, record) :]
            except OSError:
                os.ftruncate(self._file, size)
                raise


def _boot() -> str:
    """Another one after each start of the machine: what a process wrote before is in memory, or must be on disk."""
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""


# The digests of an entry; None: it is not there.
_State = tuple[int, int] | None


def _state(digests: list[int]) -> _State:
    return digests[0], digests[1]


@dataclass(frozen=True, slots=True)
class Write:
    """Entries that are written, with their digests [n, 2]; None: deleted."""

    ids: U64
    digests: U64 | None

    def states(self) -> Iterator[tuple[int, _State]]:
        """Each id with what it is afterwards."""
        if self.digests is None:
            yield from ((number, None) for number in self.ids.tolist())
        else:
            yield from zip(self.ids.tolist(), map(_state, self.digests.tolist()), strict=True)


@dataclass(frozen=True, slots=True)
class Damage:
    """Entries that are not what was written, those that are gone, and those that nobody wrote."""

    changed: U64
    missing: U64
    unknown: U64

    @staticmethod
    def none() -> Damage:
        """Nothing is wrong."""
        return Damage(_ids([]), _ids([]), _ids([]))

    def __add__(self, other: Damage) -> Damage:
        return Damage(
            np.concatenate([self.changed, other.changed]),
            np.concatenate([self.missing, other.missing]),
            np.concatenate([self.unknown, other.unknown]),
        )

    def __bool__(self) -> bool:
        return bool(len(self.changed) or len(self.missing) or len(self.unknown))

    def __str__(self) -> str:
        kinds = {"changed": self.changed, "missing": self.missing, "unknown": self.unknown}
        return ", ".join(
            f"{len(ids)} {name} ({_some(ids)})" for name, ids in kinds.items() if len(ids)
        )


def _some(ids: U64) -> str:
    named = ", ".join(map(str, ids[:_MOST_NAMED].tolist()))
    return f"id {named}" if len(ids) <= _MOST_NAMED else f"ids {named}, ..."


@dataclass(frozen=True, slots=True)
class Known:
    """What the entries of a shard must be: ids [n] ascending, digests [n, 2].

    `allowed`: for ids whose last write may not have been made, or need not have survived, every state that is right;
    None: not there. `any_new`: entries of other ids may be there, whose write was not acknowledged as durable.
    """

    ids: U64
    digests: U64
    allowed: Mapping[int, set[_State]]
    any_new: bool = False

    @staticmethod
    def of(ids: U64, digests: U64, write: Write | None) -> Known:
        """Entries that are known for certain, but for those of a write that may not have been made."""
        allowed: dict[int, set[_State]] = {}
        if write is not None:
            before = dict(zip(ids.tolist(), map(_state, digests.tolist()), strict=True))
            for number, state in write.states():
                allowed.setdefault(number, {before.get(number)}).add(state)
        return Known(ids, digests, allowed)

    def compare(self, ids: U64, digests: U64) -> tuple[Damage, U64]:
        """What is wrong with entries as the engine has them (a digest of 0 was not read), and which to remove.

        Those were never acknowledged, or need not have survived, and are not whole.
        """
        places = np.searchsorted(self.ids, ids)
        places[places == len(self.ids)] = 0
        known = self.ids[places] == ids if len(self.ids) else np.zeros(len(ids), np.bool_)
        expected = self.digests[places] if len(self.ids) else np.zeros((len(ids), 2), np.uint64)
        same = (digests == expected) | (digests == 0) | (expected == 0)
        wrong = ids[~(known & same.all(axis=1))]
        found = dict(zip(ids.tolist(), digests.tolist(), strict=True)) if len(wrong) else {}
        changed: list[int] = []
        unknown: list[int] = []
        removed: list[int] = []
        for number in wrong.tolist():
            states = self.allowed.get(number, set())
            if any(state is not None and _agree(found[number], state) for state in states):
                continue
            is_known = bool(np.isin(np.uint64(number), self.ids))
            if None in states or (self.any_new and not is_known):
                removed.append(number)
            else:
                (changed if is_known else unknown).append(number)
        gone = np.setdiff1d(self.ids, ids, assume_unique=True)
        missing = [n for n in gone.tolist() if None not in self.allowed.get(n, set())]
        return Damage(_ids(changed), _ids(missing), _ids(unknown)), _ids(removed)


def _agree(found: list[int], state: tuple[int, int]) -> bool:
    return all(one in (0, other) for one, other in zip(found, state, strict=True))


def _ids(numbers: list[int]) -> U64:
    return np.array(numbers, np.uint64)


def read_log(path: Path, ids: U64, digests: U64) -> Known:
    """What entries must be that were `ids` [n] with `digests` [n, 2] before the writes of the log.

    Raises CorruptMemory when the log is damaged, or that of other entries.
    """
    with storage_call(f"read {path}", opening=True):
        records, whole = _records(path.read_bytes())
    kind, body = records[0] if records else (Kind.DONE, b"")
    boot, _, entries = body.decode(errors="replace").partition(" ")
    same_boot = boot == _boot()
    cut = same_boot and not whole  # else by a loss of power
    if kind is not Kind.OPENED or cut:
        raise CorruptMemory(f"{path}, which has its last writes, is damaged")
    if entries != str(len(ids)):
        raise CorruptMemory(f"{path} is of {entries} entries, not of the {len(ids)} before it")
    now: dict[int, _State] = dict(zip(ids.tolist(), map(_state, digests.tolist()), strict=True))
    allowed: dict[int, set[_State]] = {}
    for write, settled in _writes(records, same_boot=same_boot):
        for each, state in write.states():
            if settled:
                allowed.pop(each, None)
            else:
                allowed.setdefault(each, {now.get(each)}).add(state)
            now[each] = state
    order = sorted(each for each, state in now.items() if state is not None)
    expected = np.array([now[each] for each in order], np.uint64).reshape(len(order), 2)
    return Known(_ids(order), expected, allowed, any_new=not same_boot)


def _writes(
    records: Sequence[tuple[Kind, bytes]], *, same_boot: bool
) -> Iterator[tuple[Write, bool]]:
    """Each write, and whether all of it must be there."""
    kinds = [kind for kind, _ in records]
    begun = [n for n, kind in enumerate(kinds) if kind in (Kind.UPSERT, Kind.DELETE)]
    last_flush = max((n for n, kind in enumerate(kinds) if kind is Kind.FLUSHED), default=0)
    for number, following in pairwise([*begun, len(kinds)]):
        done = Kind.DONE in kinds[number:following]
        flushed = done and kinds.index(Kind.DONE, number) < last_flush
        found = np.frombuffer(records[number][1], _WRITES)
        digests = None if kinds[number] is Kind.DELETE else found["digests"]
        yield Write(found["id"], digests), done if same_boot else flushed


def _records(text: bytes) -> tuple[list[tuple[Kind, bytes]], bool]:
    """The records up to the first that is damaged or cut, and whether these are all."""
    found: list[tuple[Kind, bytes]] = []
    at, head_bytes = 0, _HEAD.size + _SUM.size
    while at < len(text):
        head, start = text[at : at + _HEAD.size], at + head_bytes
        if start > len(text) or _SUM.unpack_from(text, at + _HEAD.size)[0] != zlib.crc32(head):
            return found, False
        kind, length, check = _HEAD.unpack(head)
        body = text[start : start + length]
        if len(body) < length or zlib.crc32(body) != check or kind not in list(Kind):
            return found, False
        found.append((Kind(kind), body))
        at = start + length
    return found, True


# Of a segment that has an index these change when an entry of it is replaced or deleted, and nothing else.
_CHANGING = ("id_tracker.deleted", "id_tracker.versions", "payload_storage/", "segment.json")
_INDEXED = "vector_storage/matrix.dat"
_SEARCH_KEYS = "search_keys.npz"
_SUMS_FORMAT = 1
_ENGINE = "qdrant-edge-py"


class Sums:
    """SHA-256 of the files of a shard, by their paths in it."""

    def __init__(self, files: Mapping[str, Content]) -> None:
        self.files = dict(files)

    @staticmethod
    def of(shard: Path, known: Sums | None = None, *, everything: bool = False) -> Sums:
        """Of the files that never change again, or of all; those of `known` that never change are not read again."""
        kept = known.files if known is not None else {}
        paths = list(_files(shard))
        fixed = set(_fixed(paths))
        # Of a segment the name is new with its content; how search keys are made is written anew under the old one
        kept = {path: kept[path] for path in (fixed & kept.keys()) - {_SEARCH_KEYS}}
        wanted = paths if everything else sorted(fixed)
        with storage_call(f"read {shard}"):
            return Sums(
                {
                    path: kept[path] if path in kept else read_content(shard / path)
                    for path in wanted
                }
            )

    @staticmethod
    def load(path: Path) -> Sums | None:
        """Those at `path`; None when there are none that are whole and of this engine, which may write files anew."""
        try:
            body = json.loads(path.read_bytes())
            files = {name: Content(**content) for name, content in body["files"].items()}
            whole = body["format"] == _SUMS_FORMAT and body["crc32"] == _check(body["files"])
            whole = whole and body["engine"] == metadata.version(_ENGINE)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return Sums(files) if whole else None

    def save(self, path: Path) -> None:
        """Writes them durably. Raises StorageError."""
        files = {name: asdict(content) for name, content in sorted(self.files.items())}
        body = {
            "format": _SUMS_FORMAT,
            "engine": metadata.version(_ENGINE),
            "crc32": _check(files),
            "files": files,
        }
        text = json.dumps(body, indent=1).encode()
        write_atomically(path, lambda file: file.write(text))

    def problems(self, shard: Path, *, everything: bool) -> list[str]:
        """What is wrong with the files that never change, or with all. Raises StorageError."""
        paths = list(_files(shard))
        checked = self.files.keys() if everything else set(_fixed(self.files)) | set(_fixed(paths))
        found = []
        for path in sorted(checked):
            expected = self.files.get(path)
            with storage_call(f"read {shard / path}"):
                if not (shard / path).is_file():
                    found.append(f"{path} is missing")
                elif expected is None:
                    found.append(f"{path} has no sum")
                elif read_content(shard / path) != expected:
                    found.append(f"{path} has other content than was written")
        return found


def impossible_lengths(shard: Path) -> list[str]:
    """Files that would have the engine take more room than there is, or not come to an end: flags and places."""
    found = []
    with storage_call(f"read {shard}"):
        for path in shard.glob("segments/**/status.dat"):
            flags = [each.stat().st_size for each in path.parent.glob("flags_*.dat")]
            counted = int.from_bytes(path.read_bytes()[:8], "little")
            if flags and counted > 8 * max(flags):
                found.append(f"{path.relative_to(shard)} counts {counted} flags")
        tails = {
            path.relative_to(shard): _impossible_place(path.read_bytes())
            for path in shard.glob("segments/*/mutable_id_tracker.mappings")
        }
    return found + [f"{path} {problem}" for path, problem in tails.items() if problem]


# Of a tail's mappings: kind, then id and place in the segment of an entry that was added, or the id of one that went.
_ADDED, _GONE = struct.Struct("<BQI"), struct.Struct("<BQ")
_ADDED_KIND, _GONE_KIND = 1, 3


def _impossible_place(text: bytes) -> str:
    """What is wrong with places: they are given out in turn, and the engine makes room up to the largest."""
    at = added = largest = 0
    while at < len(text):
        record = {_ADDED_KIND: _ADDED, _GONE_KIND: _GONE}.get(text[at])
        if record is None:
            return f"has a record of an unknown kind, {text[at]}"
        if at + record.size > len(text):
            break  # cut, which the engine knows
        if record is _ADDED:
            added, largest = added + 1, max(largest, record.unpack_from(text, at)[2])
        at += record.size
    return f"numbers {largest + 1} places for {added} entries" if largest >= max(added, 1) else ""


def file_problems(files: CollectionFiles) -> list[str]:
    """What is wrong with the engine's files of a collection that is not open: after a close, with any of them.

    Raises StorageError.
    """
    number = files.read().generation
    if (sums := Sums.load(files.sums(number))) is None:
        return []
    return sums.problems(files.shard(number), everything=not files.log(number).exists())


def _files(shard: Path) -> Iterator[str]:
    for parent, _, names in os.walk(shard):
        yield from (Path(parent, name).relative_to(shard).as_posix() for name in names)


def _fixed(paths: Iterable[str]) -> Iterator[str]:
    """Those of files that never change: of segments with an index, and how search keys are made."""
    paths = list(paths)
    indexed = {path.removesuffix(_INDEXED) for path in paths if path.endswith(f"/{_INDEXED}")}
    for path in paths:
        segment = "/".join(path.split("/")[:2]) + "/"
        inside = path.removeprefix(segment)
        if "/" not in path:
            if path == _SEARCH_KEYS:
                yield path
        elif segment in indexed and not inside.startswith(_CHANGING):
            yield path


def _check(files: Mapping[str, object]) -> int:
    return zlib.crc32(json.dumps(files, sort_keys=True).encode())
