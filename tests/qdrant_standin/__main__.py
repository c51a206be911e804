"""`python -m tests.qdrant_standin --data DIR`: the stand-in until SIGTERM or SIGINT.

Lines on stdin are faults as JSON, {"call": "delay", "arguments": {"seconds": 1}}, each answered by a line on stdout.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import grpc

from tests.qdrant_standin.faults import Faults
from tests.qdrant_standin.server import QdrantStandIn

_CALLS = ("delay", "black_hole", "fail", "rate_limit", "blind", "lift")


def main() -> None:
    """Serves until a signal comes."""
    options = _parser().parse_args()
    server = QdrantStandIn(options.data, options.port, options.api_key, options.version)
    server.indexing_threshold_kb = options.indexing_threshold_kb
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    with server:
        _print(f"listening on {server.url}")
        _print(f"REST on {server.rest_url}")
        threading.Thread(target=_take_faults, args=(server.faults,), daemon=True).start()
        ended.wait()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.qdrant_standin")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--api-key")
    parser.add_argument("--version", default="1.20.0")
    parser.add_argument("--indexing-threshold-kb", type=int, default=10_000)
    return parser


def _take_faults(faults: Faults) -> None:
    for line in sys.stdin:
        try:
            _apply(faults, json.loads(line))
        except (ValueError, TypeError, KeyError) as error:
            _print(f"error: {type(error).__name__}: {error}")
        else:
            _print("ok")


def _apply(faults: Faults, wanted: dict[str, Any]) -> None:
    call, arguments = wanted["call"], wanted.get("arguments", {})
    if call == "version":
        faults.version = arguments["version"]
        return
    if call not in _CALLS:
        raise ValueError(f"no fault {call}; there are {', '.join(_CALLS)}, version")
    if "code" in arguments:
        arguments["code"] = grpc.StatusCode[arguments["code"]]
    getattr(faults, call)(**arguments)


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
