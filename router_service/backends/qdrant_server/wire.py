"""qdrant-client's generated messages and stubs, without its clients, whose import takes a second and 40 MB."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_PACKAGE = "qdrant_client"


def _stubs() -> Any:
    """The package's sub-package `grpc`; the package itself is imported as a whole by whoever asks for it."""
    if _PACKAGE in sys.modules:
        return importlib.import_module(f"{_PACKAGE}.grpc")
    spec = find_spec(_PACKAGE)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(f"no module named {_PACKAGE!r}", name=_PACKAGE)
    hollow = ModuleType(_PACKAGE)
    hollow.__path__ = list(spec.submodule_search_locations)
    sys.modules[_PACKAGE] = hollow
    try:
        return importlib.import_module(f"{_PACKAGE}.grpc")
    finally:
        del sys.modules[_PACKAGE]


q = _stubs()

# What a name led to before has this alias beside that of the name, so that it is found after a crash.
REPLACED = "~~replaced"
