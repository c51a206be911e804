"""Files of memory entries: JSONL, Parquet and safetensors, read and written in batches. See docs/formats.md."""

from router_service.cli.entry_files.batches import EntryBatch, EntryShape, FileError
from router_service.cli.entry_files.formats import (
    FileFormat,
    format_of,
    open_reader,
    open_writer,
    read_metadata,
)

__all__ = [
    "EntryBatch",
    "EntryShape",
    "FileError",
    "FileFormat",
    "format_of",
    "open_reader",
    "open_writer",
    "read_metadata",
]
