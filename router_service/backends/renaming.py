"""Backends whose collections change names while they are used: those in RAM and on a server."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable


@runtime_checkable
class Renaming(Protocol):
    """A Backend in which collections take the names of others. Raises StorageError."""

    def taking_over(self, names: Mapping[str, str]) -> AbstractContextManager[None]:
        """Inside, each of the names leads to the collection of the other name, which leads nowhere.

        Collections that are open stay those they are; when the inside raises, they become those that their names lead
        to. No error where the other name is not there: then that is done already.
        """
        ...

    def drop_replaced(self, name: str) -> None:
        """Removes the collection that `name` led to before taking_over(); nobody may search it any more."""
        ...
