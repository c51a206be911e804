"""Tells tokens that a memory has heard before: their nearest key is about where they are."""

from __future__ import annotations

import torch
from knnmoe.v1.types_pb2 import DTYPE_F32
from torch import Tensor

from model_runner.architectures import Assignment
from model_runner.errors import BadInput
from model_runner.memory_builder.builder import TracedWindows
from model_runner.memory_builder.entries import LayerEntries
from model_runner.memory_builder.layer_trace import LayerTrace
from model_runner.memory_builder.recipes import assignment_values
from model_runner.router_client import RouterClient
from model_runner.texts import ExampleRef
from model_runner.wire import decode_tensor

TOKENS_PER_REQUEST = 512


class KnownTokens:
    """A `Keep` of the builder: entries whose nearest key has a similarity below `threshold`, in (0, 1].

    The example's own entries do not count: a corrected answer replaces the one before it.
    """

    def __init__(self, client: RouterClient, threshold: float) -> None:
        if not 0 < threshold <= 1:
            raise BadInput(f"skip-known: got {threshold}, expected a similarity in (0, 1]")
        self._client, self._threshold = client, threshold

    def keep(self, traced: TracedWindows, trace: LayerTrace, entries: LayerEntries) -> Tensor:
        """Which entries ([n] bool, on the host) the memory does not know yet."""
        logits = trace.router_logits.flatten(0, 1)[traced.kept]
        own = assignment_values(trace, trace.router_logits.flatten(0, 1))
        own = Assignment(own.weights[traced.kept], own.experts[traced.kept])
        origins = [ExampleRef(p.source, p.example) for p in entries.provenance]
        found = [
            self._similarities(entries.layer, rows, entries.keys, logits, own, origins)
            for rows in _spans(len(entries))
        ]
        return torch.cat(found) < self._threshold

    def _similarities(
        self,
        layer: int,
        rows: slice,
        keys: Tensor,
        logits: Tensor,
        own: Assignment,
        origins: list[ExampleRef],
    ) -> Tensor:
        """Similarity [m] in f32 of each token's nearest key; 0 where there is none."""
        response = self._client.route(
            layer,
            keys[rows],
            logits[rows],
            Assignment(own.weights[rows], own.experts[rows]),
            exclude=origins[rows],
            with_neighbours=True,
            neighbours=1,
        )
        if response is None:
            raise BadInput("skip-known needs a client that raises when the sidecar fails")
        return decode_tensor(response.neighbours.similarities, DTYPE_F32)[:, 0]


def _spans(tokens: int) -> list[slice]:
    return [slice(at, at + TOKENS_PER_REQUEST) for at in range(0, tokens, TOKENS_PER_REQUEST)]
