"""A file of entries, as the source or the sink of a copy: JSONL, Parquet or safetensors. See docs/formats.md.

Parquet's library takes half a second to load, so it is loaded on demand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from enum import StrEnum
from pathlib import Path

from router_service.transfer.endpoints import EntryShape
from router_service.transfer.entry_fields import EntryReader, EntryWriter, FileError
from router_service.transfer.jsonl import JsonlReader, JsonlWriter
from router_service.transfer.safetensors import SafetensorsReader, SafetensorsWriter


class FileFormat(StrEnum):
    """Formats, by the end of the file's name."""

    JSONL = "jsonl"
    PARQUET = "parquet"
    SAFETENSORS = "safetensors"


def format_of(path: Path) -> FileFormat:
    """The format that a file's name says. Raises FileError."""
    try:
        return FileFormat(path.suffix.lower().removeprefix("."))
    except ValueError:
        raise FileError(
            path,
            "",
            "unknown format, expected a name that ends in .jsonl, .parquet or .safetensors",
        ) from None


def open_reader(path: Path, shape: EntryShape, layer: int | None = None) -> EntryReader:
    """A reader of a file of entries; `layer` stands in for a layer that rows do not name. Raises FileError."""
    reader, _ = _by_format(_format_of_file(path))
    with _file_errors(path):
        return reader(path, shape, layer)


def open_writer(
    path: Path,
    shape: EntryShape,
    file_format: FileFormat,
    metadata: Mapping[str, str] | None = None,
) -> EntryWriter:
    """A writer of a new file; JSONL has no place for metadata. Raises FileError."""
    _, writer = _by_format(file_format)
    with _file_errors(path):
        return writer(path, shape, metadata or {})


def read_metadata(path: Path) -> dict[str, str]:
    """What a file says about itself beside its entries; JSONL says nothing. Raises FileError."""
    reader, _ = _by_format(_format_of_file(path))
    return reader.metadata_of(path)


def _by_format(file_format: FileFormat) -> tuple[type[EntryReader], type[EntryWriter]]:
    if file_format is FileFormat.JSONL:
        return JsonlReader, JsonlWriter
    if file_format is FileFormat.PARQUET:
        from router_service.transfer.parquet import ParquetReader, ParquetWriter

        return ParquetReader, ParquetWriter
    return SafetensorsReader, SafetensorsWriter


def _format_of_file(path: Path) -> FileFormat:
    chosen = format_of(path)
    if not path.is_file():
        raise FileError(path, "", "no such file" if not path.exists() else "not a file")
    return chosen


@contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FileError(path, "", error.strerror or str(error)) from error


@contextmanager
def new_file(path: Path, shape: EntryShape, metadata: Mapping[str, str]) -> Iterator[EntryWriter]:
    """A file to write to, which appears, or replaces what is there, when it is whole. Raises FileError."""
    partial = path.with_name(path.name + ".partial")
    try:
        with _file_errors(path):
            with closing(open_writer(partial, shape, format_of(path), metadata)) as writer:
                yield writer
                writer.finish()
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
