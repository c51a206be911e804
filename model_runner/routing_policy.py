"""The policy that asks a routing memory: what the router hooks call at every MoE layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from knnmoe import tensors
from knnmoe.v1.routing_pb2 import RouteResponse
from torch import Tensor

from model_runner.architectures import Assignment
from model_runner.router_client import RouterClient
from model_runner.router_hooks import Logits, RouterCall
from model_runner.texts import ExampleRef
from model_runner.wire import decode_assignment, decode_floats


@dataclass(slots=True)
class LayerUse:
    """What a memory did at one layer: tokens asked about, those that abstained, the sum of lambda."""

    tokens: int = 0
    abstained: int = 0
    lambda_sum: float = 0.0
    # Calls that were not asked about: a router input was not finite.
    not_finite: int = 0

    @property
    def lambda_mean(self) -> float:
        """Mean lambda; 0 before the first token."""
        return self.lambda_sum / max(1, self.tokens)


@dataclass(slots=True)
class RetrievalPolicy:
    """Blends each layer's routing with the memory behind `client`.

    Attributes:
        client: says what happens when the sidecar fails.
        exclude: examples whose entries are not read, one per sequence of the batch (leave-one-example-out); empty for
            none.
        use: by layer.

    """

    client: RouterClient
    exclude: Sequence[ExampleRef] = ()
    use: dict[int, LayerUse] = field(default_factory=dict)

    def __call__(self, call: RouterCall) -> Assignment | Logits | None:
        """The blended routing, or None when the model's own stands."""
        use = self.use.setdefault(call.site.layer, LayerUse())
        rows = _rows_to_ask(call)
        inputs, logits, own = _select(call, rows)
        if not len(inputs):
            return None
        if not torch.isfinite(inputs).all():
            use.not_finite += 1
            return None
        response = self.client.route(
            call.site.layer, inputs, logits, own, exclude=self._excluded(call, rows)
        )
        if response is None:
            return None
        _count(use, response)
        return _reply(response, call, rows)

    def _excluded(self, call: RouterCall, rows: Tensor | None) -> list[ExampleRef]:
        if not self.exclude:
            return []
        tokens_each = len(call.router_input) // len(self.exclude)
        every = [ref for ref in self.exclude for _ in range(tokens_each)]
        return every if rows is None else [every[row] for row in rows.tolist()]


def _rows_to_ask(call: RouterCall) -> Tensor | None:
    """Rows [n] that are not padding; None = all."""
    if call.valid is None or bool(call.valid.all()):
        return None
    return call.valid.nonzero().flatten()


def _select(call: RouterCall, rows: Tensor | None) -> tuple[Tensor, Tensor, Assignment]:
    own = Assignment(call.weights, call.experts)
    if rows is None:
        return call.router_input, call.router_logits, own
    return (
        call.router_input[rows],
        call.router_logits[rows],
        Assignment(own.weights[rows], own.experts[rows]),
    )


def _count(use: LayerUse, response: RouteResponse) -> None:
    lambdas = tensors.to_array(response.lambdas)
    use.tokens += len(lambdas)
    use.abstained += int(np.count_nonzero(tensors.to_array(response.abstained)))
    use.lambda_sum += float(lambdas.sum())


def _reply(
    response: RouteResponse, call: RouterCall, rows: Tensor | None
) -> Assignment | Logits | None:
    kind = response.WhichOneof("blended")
    if kind is None:
        return None
    if kind == "router_logits":
        return Logits(_merged(call.router_logits, decode_floats(response.router_logits), rows))
    blended = decode_assignment(response.assignment)
    width = blended.experts.shape[1]
    return Assignment(
        _merged(_widened(call.weights, width), blended.weights, rows),
        _merged(_widened(call.experts, width), blended.experts, rows),
    )


def _widened(own: Tensor, width: int) -> Tensor:
    """Own columns [T, k] padded to `width` with zeros: expert 0 at weight 0."""
    return torch.nn.functional.pad(own, (0, max(0, width - own.shape[1])))


def _merged(own: Tensor, blended: Tensor, rows: Tensor | None) -> Tensor:
    """`own` with `rows` replaced; on the device of `own`."""
    if rows is None:
        return blended.to(own.device)
    merged = own.clone()
    merged[rows] = blended.to(own)
    return merged
