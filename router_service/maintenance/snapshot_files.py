"""The files of a snapshot: listed, compared with the manifest, copied."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from router_service.backends.boundary import storage_call
from router_service.errors import SnapshotInvalid
from router_service.maintenance.snapshot_manifest import FILE_NAME, SnapshotManifest
from router_service.maintenance.sparse_files import Content, copy_file, read_content

# Called before each file with its path; what it raises ends the work.
Report = Callable[[str], None]

_MOST_NAMED = 20


def say_nothing(path: str) -> None:
    """The Report of callers who do not watch."""


def files_of(directory: Path) -> Iterator[str]:
    """Paths below a directory, in order, of everything that is not a directory."""
    with storage_call(f"list {directory}"):
        for parent, directories, names in os.walk(directory, onerror=_raise):
            directories.sort()
            links = [name for name in directories if Path(parent, name).is_symlink()]
            for name in sorted(names + links):
                yield Path(parent, name).relative_to(directory).as_posix()


def check_listing(directory: Path, manifest: SnapshotManifest) -> None:
    """Raises SnapshotInvalid unless the files are those of the manifest, in name, kind and size."""
    found = set(files_of(directory)) - {FILE_NAME}
    problems = [f"{path} is missing" for path in manifest.files.keys() - found]
    problems += [f"{path} is not in the manifest" for path in found - manifest.files.keys()]
    for path in found & manifest.files.keys():
        problems += _problems_of(directory / path, path, manifest.files[path])
    refuse(directory, problems)


def check_contents(
    directory: Path, manifest: SnapshotManifest, report: Report, *, named: Path | None = None
) -> None:
    """Raises SnapshotInvalid, about `named`, unless every file holds what the manifest says."""
    problems = []
    for path, expected in manifest.files.items():
        report(path)
        with storage_call(f"read {directory / path}"):
            if read_content(directory / path) != expected:
                problems.append(f"{path} has other content than when the snapshot was made")
    refuse(named or directory, problems)


def contents_of(directory: Path, report: Report) -> dict[str, Content]:
    """What a manifest says about the files below a directory."""
    contents = {}
    for path in files_of(directory):
        report(path)
        with storage_call(f"read {directory / path}"):
            contents[path] = read_content(directory / path)
    return contents


def copy_files(source: Path, paths: Iterable[str], target: Path, report: Report) -> None:
    """Copies files to the same paths below another directory, holes staying holes. Raises StorageError."""
    made = None
    for path in paths:
        report(path)
        with storage_call(f"copy {source / path}"):
            copy = target / path
            if copy.parent != made:
                made = copy.parent
                made.mkdir(parents=True, exist_ok=True)
            copy_file(source / path, copy)


def refuse(source: Path, problems: list[str]) -> None:
    """Raises SnapshotInvalid if there are problems; names the first ones."""
    if problems:
        more = f" and {len(problems) - _MOST_NAMED} more" if len(problems) > _MOST_NAMED else ""
        named = "; ".join(ascii(problem)[1:-1] for problem in sorted(problems)[:_MOST_NAMED])
        raise SnapshotInvalid(f"{source} is damaged: {named}{more}; use another snapshot")


def _problems_of(file: Path, path: str, expected: Content) -> list[str]:
    with storage_call(f"inspect {file}"):
        status = file.lstat()
    if not stat.S_ISREG(status.st_mode):
        return [f"{path} is not a plain file"]
    if status.st_size != expected.size_bytes:
        return [f"{path} has {status.st_size} bytes, expected {expected.size_bytes}"]
    return []


def _raise(error: OSError) -> None:
    raise error
