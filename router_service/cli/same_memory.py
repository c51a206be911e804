"""Whether entries of one memory may go into another: same model, same kind, same similarity."""

from __future__ import annotations

from typing import Protocol

from knnmoe.v1 import types_pb2 as types_pb

from router_service.cli.errors import BadInput
from router_service.cli.output import plain
from router_service.errors import shorten


class Described(Protocol):
    """A memory, or a file of one."""

    @property
    def fingerprint(self) -> types_pb.ModelFingerprint:
        """The model."""
        ...

    @property
    def settings(self) -> types_pb.MemorySettings:
        """How it is read."""
        ...


def require_same_entries(left: str, one: Described, right: str, other: Described) -> None:
    """Raises BadInput that names each difference on both sides; `left` and `right` say what the sides are."""
    model = _differences(left, plain(one.fingerprint), right, plain(other.fingerprint))
    if model:
        raise BadInput(
            f"{left} and {right} are of different models ({model}); entries help only the model that they were made for"
        )
    fixed = _differences(left, _fixed(one.settings), right, _fixed(other.settings))
    if fixed:
        raise BadInput(f"{left} and {right} hold different entries ({fixed}); see: memory show")


def require_same_settings(left: str, one: Described, right: str, other: Described) -> None:
    """Raises BadInput that names each setting that differs, on both sides."""
    differing = _differences(left, plain(one.settings), right, plain(other.settings))
    if differing:
        raise BadInput(
            f"{right} is there already, with other settings ({differing}); pass --into to add to it, or --as NAME"
        )


def _fixed(settings: types_pb.MemorySettings) -> dict[str, object]:
    document = plain(settings)
    return {name: document[name] for name in ("kind", "similarity")}


def _differences(left: str, one: dict[str, object], right: str, other: dict[str, object]) -> str:
    return "; ".join(
        f"{name}: {left} {shorten(value)}, {right} {shorten(other.get(name))}"
        for name, value in one.items()
        if value != other.get(name)
    )
