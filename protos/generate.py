"""Generates the Python code of the protos: `python protos/generate.py [OUT_DIR]` (default: beside the protos).

The generated code is committed so that users need no compiler; a test regenerates it and compares.
"""

import os
import sys
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent


def generate(out: Path) -> list[Path]:
    """Compiles every proto below ROOT into `out`; returns the files written. Raises RuntimeError on a proto error."""
    # The plugins lie beside the interpreter, on the PATH or not.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    sources = sorted(str(p.relative_to(ROOT)) for p in ROOT.rglob("*.proto"))
    outputs = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python", "mypy_grpc")]
    well_known = str(Path(protoc.__file__).parent / "_proto")
    code = protoc.main(["protoc", f"-I{ROOT}", f"-I{well_known}", *outputs, *sources])
    if code:
        raise RuntimeError(f"protoc failed with exit code {code}")
    return sorted(out.glob("knnmoe/v1/*_pb2*.py*"))


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
