"""The compiled part of lookups on a CPU: native.cpp, by the machine's own C++ compiler.

A step of a small model takes 2 ms; between two lookups each of torch's operations takes 10 to 25 us, some twenty of
them 0.2 ms, and two calls of this library 0.05 (2026-11-29). It is compiled in a second, by a thread, when it is first
wanted, for this CPU, and kept for this process only. Lookups go on without it until then.
"""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import tempfile
import threading
from concurrent.futures import Future
from functools import cache
from pathlib import Path

import torch

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("native.cpp")
# Rows are laid out in blocks of so many; K is at most this (groups of rows of which a scan keeps the best, halved).
BLOCK, MOST_NEIGHBOURS = 16, 128
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
_TIMEOUT_S = 120.0
_Pointer, _Number = ctypes.c_void_p, ctypes.c_int64


class Keys(ctypes.Structure):
    """As in native.cpp; addresses of tensors, which whoever makes it keeps alive."""

    _fields_ = (
        *((name, _Pointer) for name in ("bytes", "scales", "norms", "errors", "sums")),
        *((name, _Pointer) for name in ("mean", "keys")),
        *((name, _Number) for name in ("blocks", "dimension", "quads")),
        ("longest", ctypes.c_float),
    )


class Settings(ctypes.Structure):
    """As in native.cpp."""

    _fields_ = (
        *((name, ctypes.c_float) for name in ("gamma", "step_size", "null_weight", "min_lambda")),
        *((name, ctypes.c_float) for name in ("min_similarity", "smallest")),
        ("deltas", _Number),
    )


def ready() -> ctypes.CDLL | None:
    """The library; None before it is compiled, and where it cannot be."""
    compiling = _compiling()
    return compiling.result() if compiling.done() else None


def compiled() -> ctypes.CDLL | None:
    """As `ready`, once the compiler has ended."""
    return _compiling().result()


@cache
def _compiling() -> Future[ctypes.CDLL | None]:
    made: Future[ctypes.CDLL | None] = Future()
    if torch.cpu.get_capabilities().get("avx512_vnni"):
        threading.Thread(target=lambda: made.set_result(_compile()), name="compiler").start()
    else:
        log.info("lookups are not compiled: this CPU has no AVX512 VNNI")
        made.set_result(None)
    return made


def _compile() -> ctypes.CDLL | None:
    compiler = os.environ.get("CXX", "g++")
    with tempfile.TemporaryDirectory(prefix="knnmoe-") as directory:
        made = Path(directory) / "native.so"
        command = [compiler, *_FLAGS, "-o", str(made), str(SOURCE)]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=_TIMEOUT_S)
            library = ctypes.CDLL(str(made))
        except (OSError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", None) or b""
            log.warning(
                "lookups in the replica take longer than they could, since %s did not compile them (install g++, or "
                "name a C++ compiler in CXX): %s %s",
                *(compiler, error, said.decode(errors="replace")[-500:]),
            )
            return None
    _declare(library)
    return library


def _declare(library: ctypes.CDLL) -> None:
    p, n = _Pointer, _Number
    library.nearest.argtypes = (p, p, n, n, p, p)
    library.answer.argtypes = (p, p, n, p, n, p, p, p, n, n, p, p, p, p, p, p, p)
    library.nearest.restype, library.answer.restype = n, None
