"""Where a collection lies on disk.

    DATA/<name>/CURRENT              which generation counts, and what it holds (JSON, replaced atomically)
    DATA/<name>/gen-000000/shard/    the engine's files, and search_keys.npz when search keys are stored apart
    DATA/<name>/gen-000000/values.npz  the value table, there only while the shard has exactly these entries
    DATA/<name>/gen-000000/base.npz, writes.log, sums.json  see ledger

A generation that CURRENT does not name is what a crash left behind.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from router_service import __version__
from router_service.backends.base import CollectionSpec, Compression, Metric
from router_service.backends.disk import (
    allocated_bytes,
    disk_bytes,
    fsync_path,
    remove_durably,
    remove_tree,
    storage_call,
    write_atomically,
)
from router_service.errors import CorruptMemory, NewerFormat, newer_format

_FORMAT = 1
_VECTORS = ("segments/*/vector_storage/vectors/*", "segments/*/vector_storage/matrix.dat")


@dataclass(frozen=True, slots=True)
class Pointer:
    """The content of CURRENT."""

    generation: int
    spec: CollectionSpec
    compression: Compression

    def next(self, wanted: Compression | None) -> Pointer:
        """The generation after this one; None: with the same compression."""
        compression = wanted or self.compression
        return replace(self, generation=self.generation + 1, compression=compression)

    def to_json(self) -> bytes:
        """UTF-8 JSON with the format version."""
        content = {
            "format": _FORMAT,
            "service_version": __version__,
            "generation": self.generation,
            "dimension": self.spec.dimension,
            "metric": self.spec.metric.value,
            "value_width": self.spec.value_width,
            "quantization": self.compression.label,
        }
        return json.dumps(content, indent=1).encode()

    @staticmethod
    def from_json(text: bytes, where: str = "CURRENT") -> Pointer:
        """Raises NewerFormat, and ValueError, TypeError or KeyError when `text` is not what to_json writes."""
        content = json.loads(text)
        found = content["format"]
        if type(found) is int and found > _FORMAT:
            written_by = content.get("service_version")
            raise NewerFormat(newer_format(where, found, _FORMAT, written_by))
        if found != _FORMAT:
            raise ValueError(f"format {content['format']}, expected {_FORMAT}")
        spec = CollectionSpec(
            int(content["dimension"]), Metric(content["metric"]), int(content["value_width"])
        )
        compression = Compression.parse(content["quantization"])
        return Pointer(int(content["generation"]), spec, compression)


class CollectionFiles:
    """The directory of one collection under a data directory."""

    def __init__(self, data_dir: Path, name: str) -> None:
        self.directory = data_dir / name
        self._data_dir = data_dir
        self._current = self.directory / "CURRENT"

    def exists(self) -> bool:
        """Whether there is a collection; leftovers without CURRENT do not count."""
        return self._current.is_file()

    def generation(self, number: int) -> Path:
        """The directory of a generation."""
        return self.directory / f"gen-{number:06d}"

    def shard(self, number: int) -> Path:
        """The engine's directory of a generation."""
        return self.generation(number) / "shard"

    def values(self, number: int) -> Path:
        """The saved value table of a generation."""
        return self.generation(number) / "values.npz"

    def base(self, number: int) -> Path:
        """The value table of a generation as it was before the writes of its log."""
        return self.generation(number) / "base.npz"

    def log(self, number: int) -> Path:
        """The log of writes to a generation, there unless it was closed."""
        return self.generation(number) / "writes.log"

    def sums(self, number: int) -> Path:
        """The sums of the engine's files of a generation."""
        return self.generation(number) / "sums.json"

    def entries_about(self, pointer: Pointer) -> int:
        """How many keys the disk blocks of a generation's vector files can hold: an upper bound before it is open."""
        shard = self.shard(pointer.generation)
        held = sum(allocated_bytes(path) for pattern in _VECTORS for path in shard.glob(pattern))
        return held // (4 * pointer.spec.dimension)

    def read(self) -> Pointer:
        """Raises CorruptMemory when CURRENT is missing or cannot be understood; NewerFormat of a later version's."""
        with storage_call(f"read {self._current}", opening=True):
            return Pointer.from_json(self._current.read_bytes(), str(self._current))

    def write(self, pointer: Pointer) -> None:
        """Makes a generation the one that counts, atomically and durably."""
        fsync_path(self.shard(pointer.generation), self._data_dir)
        write_atomically(self._current, lambda file: file.write(pointer.to_json()))

    def require_spec(self, spec: CollectionSpec) -> Pointer:
        """The pointer; raises CorruptMemory when the collection holds something else than `spec`."""
        pointer = self.read()
        if pointer.spec != spec:
            raise CorruptMemory(f"{self.directory} holds {pointer.spec}, expected {spec}")
        return pointer

    def remove_leftovers(self, current: int | None) -> None:
        """Removes every generation but `current`, and half-written files."""
        for path in self.directory.glob("gen-*"):
            if current is None or path != self.generation(current):
                remove_tree(path)
        for path in self.directory.glob("*.partial"):
            remove_durably(path)

    def remove(self) -> None:
        """Removes the collection; CURRENT goes first, so that a crash leaves only leftovers."""
        if not self.directory.is_dir():
            return
        remove_durably(self._current)
        self.remove_leftovers(None)
        with storage_call(f"remove {self.directory}"):
            if not any(self.directory.iterdir()):  # collections may lie below
                self.directory.rmdir()


def segment_bytes(shard: Path, compression: Compression) -> tuple[int, int]:
    """Bytes of a shard's search keys and graphs, which a search keeps in RAM, and of all its files but the log."""
    suffix, searched = "-search" if compression.apart else "", 0
    for segment in (shard / "segments").glob("*"):
        storage = segment / f"vector_storage{suffix}"
        quantized = storage / "quantized.data"
        keys = quantized if quantized.exists() else storage / "matrix.dat"
        graph = (segment / f"vector_index{suffix}").glob("links*")
        searched += sum(path.stat().st_size for path in (keys, *graph) if path.exists())
    return searched, disk_bytes(shard / "segments")
