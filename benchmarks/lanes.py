"""The ways to look tokens up that are compared: the sidecar over three transports, FAISS in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from knnmoe import tensors
from knnmoe.v1 import routing_pb2 as pb

from benchmarks.clustered import F32, Workload
from benchmarks.sidecars import SidecarClient, Sidecars
from benchmarks.timing import Lane, Stages

SIDECAR, FAISS_FLAT, FAISS_HNSW = "sidecar", "faiss flat", "faiss hnsw"
UNARY_TCP, STREAM_TCP, STREAM_UNIX = "unary tcp", "stream tcp", "stream unix"
IN_PROCESS, IN_PROCESS_1 = "in-process", "in-process, 1 thread"
HNSW_LINKS, HNSW_EF = 16, 64


def import_faiss() -> Any:
    """FAISS, or ImportError that says how to get it."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "FAISS is not installed; it comes with the eval extra: pip install 'knn-moe[eval]'"
        ) from error
    return faiss


class FaissPeers:
    """The keys in FAISS's exact index and in its HNSW graph."""

    def __init__(self, faiss: Any, keys: F32) -> None:
        self._faiss = faiss
        self.threads = int(faiss.omp_get_max_threads())
        self.flat = faiss.IndexFlatL2(keys.shape[1])
        self.hnsw = faiss.IndexHNSWFlat(keys.shape[1], HNSW_LINKS)
        self.hnsw.hnsw.efSearch = HNSW_EF
        for index in (self.flat, self.hnsw):
            index.add(keys)

    def lanes(self, queries: F32, k: int) -> list[Lane]:
        """Searches alone: FAISS neither checks nor blends."""

        def lane(name: str, index: Any, threads: int, transport: str = IN_PROCESS) -> Lane:
            def call(tokens: slice) -> Stages:
                self._faiss.omp_set_num_threads(threads)
                index.search(queries[tokens], k)
                return None

            return Lane(name, transport, "f32", k, call)

        return [
            lane(FAISS_FLAT, self.flat, self.threads),
            lane(FAISS_FLAT, self.flat, 1, IN_PROCESS_1),
            lane(FAISS_HNSW, self.hnsw, self.threads),
            lane(FAISS_HNSW, self.hnsw, 1, IN_PROCESS_1),
        ]


def sidecar_lanes(sidecars: Sidecars, workload: Workload, k: int) -> list[Lane]:
    """From the router inputs as an array to the blended logits as an array: encoding and decoding count."""
    tcp, unix = sidecars.tcp, sidecars.unix
    return [
        _lane(tcp, tcp.unary, UNARY_TCP, workload, np.float16, k),
        _lane(tcp, tcp.streamed, STREAM_TCP, workload, np.float16, k),
        _lane(unix, unix.streamed, STREAM_UNIX, workload, np.float16, k),
        _lane(unix, unix.streamed, STREAM_UNIX, workload, np.float32, k),
    ]


def _lane(
    client: SidecarClient,
    exchange: Callable[[pb.RouteRequest], pb.RouteResponse],
    transport: str,
    workload: Workload,
    dtype: type[np.floating[Any]],
    k: int,
) -> Lane:
    inputs, logits = workload.queries.astype(dtype), workload.logits.astype(dtype)

    def call(tokens: slice) -> Stages:
        response = exchange(client.request(inputs[tokens], logits[tokens], k))
        tensors.to_array(response.lambdas)
        if response.HasField("router_logits"):
            tensors.to_array(response.router_logits)
        times = response.times
        return times.decode_ns, times.search_ns, times.blend_ns, times.encode_ns

    return Lane(SIDECAR, transport, "f16" if dtype is np.float16 else "f32", k, call)
