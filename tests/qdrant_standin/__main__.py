"""`python -m tests.qdrant_standin --data DIR [--peers 3]`: the stand-in until SIGTERM or SIGINT.

Lines on stdin are calls as JSON, {"call": "delay", "arguments": {"seconds": 1}}, each answered by a line on stdout:
faults, and in a cluster what happens to a "peer" by its number.
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

from tests.qdrant_standin.cluster import QdrantCluster
from tests.qdrant_standin.faults import Faults
from tests.qdrant_standin.server import QdrantStandIn

_FAULTS = ("delay", "black_hole", "fail", "rate_limit", "blind", "lift")
_OF_PEERS = ("kill", "stop", "start", "hang", "resume", "cut_off", "join")
_OF_CLUSTERS = ("wait_whole", "collections", "replicas_differ")


def main() -> None:
    """Serves until a signal comes."""
    options = _parser().parse_args()
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    with _server(options) as server:
        nodes = server.peers if isinstance(server, QdrantCluster) else [server]
        _print(f"listening on {','.join(node.url for node in nodes)}")
        _print(f"REST on {','.join(node.rest_url for node in nodes)}")
        threading.Thread(target=_take_calls, args=(server,), daemon=True).start()
        ended.wait()


def _server(options: argparse.Namespace) -> QdrantStandIn | QdrantCluster:
    if options.peers:
        return QdrantCluster(
            options.data,
            options.peers,
            api_key=options.api_key,
            version=options.version,
            indexing_threshold_kb=options.indexing_threshold_kb,
            time_scale=options.time_scale,
        )
    server = QdrantStandIn(options.data, options.port, options.api_key, options.version)
    server.indexing_threshold_kb = options.indexing_threshold_kb
    return server


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.qdrant_standin")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--api-key")
    parser.add_argument("--version", default="1.20.0")
    parser.add_argument("--indexing-threshold-kb", type=int, default=10_000)
    parser.add_argument("--peers", type=int, help="of a cluster")
    parser.add_argument("--time-scale", type=float, default=0.1)
    return parser


def _take_calls(server: QdrantStandIn | QdrantCluster) -> None:
    for line in sys.stdin:
        try:
            result = _apply(server, **json.loads(line))
        except (ValueError, TypeError, KeyError, AssertionError) as error:
            _print(f"error: {type(error).__name__}: {error}")
        else:
            _print(f"ok {json.dumps(result)}")


def _apply(server: Any, call: str, arguments: dict[str, Any], peer: int | None = None) -> Any:
    node = server if peer is None else server.peers[peer]
    if call in (_OF_CLUSTERS if peer is None else _OF_PEERS):
        return getattr(node, call)(**arguments)
    _apply_fault(node.faults, call, arguments)
    return None


def _apply_fault(faults: Faults, call: str, arguments: dict[str, Any]) -> None:
    if call == "version":
        faults.version = arguments["version"]
        return
    if call not in _FAULTS:
        raise ValueError(f"no fault {call}; there are {', '.join(_FAULTS)}, version")
    if "code" in arguments:
        arguments["code"] = grpc.StatusCode[arguments["code"]]
    getattr(faults, call)(**arguments)


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
