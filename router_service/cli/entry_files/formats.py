"""Which file is read or written how. Parquet's library takes half a second to load, so it is loaded on demand."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

from router_service.cli.entry_files.batches import EntryReader, EntryShape, EntryWriter, FileError
from router_service.cli.entry_files.jsonl import JsonlReader, JsonlWriter
from router_service.cli.entry_files.safetensors_entries import SafetensorsReader
from router_service.cli.entry_files.safetensors_writer import SafetensorsWriter
from router_service.cli.entry_files.tensor_file import TensorFile


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


def open_reader(path: Path, shape: EntryShape, layer: int | None) -> EntryReader:
    """A reader of a file of entries; `layer` stands in for a layer that rows do not name. Raises FileError."""
    chosen = format_of(path)
    _require_file(path)
    try:
        if chosen is FileFormat.JSONL:
            return JsonlReader(path, shape, layer)
        if chosen is FileFormat.PARQUET:
            from router_service.cli.entry_files.parquet import ParquetReader

            return ParquetReader(path, shape, layer)
        return SafetensorsReader(path, shape, layer)
    except OSError as error:
        raise FileError(path, "", error.strerror or str(error)) from error


def open_writer(
    path: Path,
    shape: EntryShape,
    file_format: FileFormat,
    metadata: Mapping[str, str] | None = None,
) -> EntryWriter:
    """A writer of a new file; JSONL has no place for metadata. Raises FileError."""
    try:
        if file_format is FileFormat.JSONL:
            return JsonlWriter(path, shape)
        if file_format is FileFormat.PARQUET:
            from router_service.cli.entry_files.parquet import ParquetWriter

            return ParquetWriter(path, shape, metadata or {})
        return SafetensorsWriter(path, shape, metadata or {})
    except OSError as error:
        raise FileError(path, "", error.strerror or str(error)) from error


def read_metadata(path: Path) -> dict[str, str]:
    """What a file says about itself beside its entries; JSONL says nothing. Raises FileError."""
    chosen = format_of(path)
    _require_file(path)
    if chosen is FileFormat.JSONL:
        return {}
    if chosen is FileFormat.PARQUET:
        from router_service.cli.entry_files.parquet import metadata_of

        return metadata_of(path)
    return TensorFile(path).metadata


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise FileError(path, "", "no such file" if not path.exists() else "not a file")
