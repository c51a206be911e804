"""A backend for the tests of the store: in RAM, with directories on disk, and failing when told to."""

from __future__ import annotations

from pathlib import Path

from router_service.backends.base import CollectionSpec
from router_service.backends.exact import ExactBackend, ExactCollection


class DirectoryBackend(ExactBackend):
    """Collections in RAM with a directory each, as an embedded engine has; fails when told to."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory
        self.fail_at: dict[str, BaseException] = {}

    def create(self, name: str, spec: CollectionSpec) -> ExactCollection:
        (self.directory / name).mkdir()
        self._maybe_fail(name)
        return super().create(name, spec)

    def open(self, name: str, spec: CollectionSpec) -> ExactCollection:
        self._maybe_fail(name)
        return super().open(name, spec)

    def drop(self, name: str) -> None:
        super().drop(name)
        if (self.directory / name).is_dir():
            (self.directory / name).rmdir()

    def names(self) -> list[str]:
        return sorted(self._collections)

    def _maybe_fail(self, name: str) -> None:
        if name in self.fail_at:
            raise self.fail_at[name]
