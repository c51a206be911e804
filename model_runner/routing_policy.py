"""The policy that asks a routing memory: what the router hooks call at every MoE layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from knnmoe.client import ExampleRef
from torch import Tensor

from model_runner.architectures.families import Assignment
from model_runner.errors import BadInput
from model_runner.router_hooks import Logits, RouterCall

# The one place where the runner cuts a lookup: tokens beyond this many bytes of router inputs and logits go in another
# request. A quarter of channels.MAX_MESSAGE_BYTES: the rest is for examples to exclude, the own assignment and a reply
# as large as the request, and for a service whose limit is set lower.
MAX_REQUEST_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Retrieved:
    """What a memory says about T tokens of one layer.

    Attributes:
        lambdas: f32 [T], the weight of the memory; 0 for a token that abstained.
        abstained: bool [T].
        blended: [T, ...] of the memory's kind; None when every token abstained.

    """

    lambdas: Tensor
    abstained: Tensor
    blended: Assignment | Logits | None


class Retriever(Protocol):
    """Where a memory's answers come from: a sidecar (RouterClient), or anything that answers as one."""

    # Lookups that fell back, by layer and reason.
    fallbacks: Counter[tuple[int, str]]

    def lookup(
        self,
        layer: int,
        router_input: Tensor,
        router_logits: Tensor,
        own: Assignment,
        *,
        exclude: Sequence[ExampleRef] = (),
    ) -> Retrieved | None:
        """T tokens: router_input [T, d], logits [T, N], own assignment [T, k]; None when the own router stands.

        `exclude`: none, or one example per token whose entries are not read.
        """
        ...


@dataclass(slots=True)
class LayerUse:
    """What a memory did at one layer: tokens asked about, those that abstained, lambda summed over the tokens."""

    tokens: int = 0
    abstained: int = 0
    lambda_sum: float = 0.0
    # Calls that were not asked about: a router input or logit was not finite.
    not_finite: int = 0

    @property
    def lambda_mean(self) -> float:
        """Mean lambda; 0 before the first token."""
        return self.lambda_sum / max(1, self.tokens)


@dataclass(slots=True)
class RetrievalPolicy:
    """Blends each layer's routing with the memory behind a retriever.

    Attributes:
        client: the retriever; says what happens when it fails.
        exclude: examples whose entries are not read, one per sequence of the batch (leave-one-example-out); empty for
            none.
        use: by layer.

    """

    client: Retriever
    exclude: Sequence[ExampleRef] = ()
    use: dict[int, LayerUse] = field(default_factory=dict)

    def __call__(self, call: RouterCall) -> Assignment | Logits | None:
        """The blended routing, or None when the model's own stands."""
        use = self.use.setdefault(call.site.layer, LayerUse())
        answers: list[Answer] = []
        for rows in _rows_to_ask(call):  # padding is left out, and may hold anything
            inputs, logits, own = _select(call, rows)
            if not (torch.isfinite(inputs).all() and torch.isfinite(logits).all()):
                use.not_finite += 1
                return None
            found = self.client.lookup(
                call.site.layer, inputs, logits, own, exclude=self._excluded(call, rows)
            )
            if found is None:
                return None
            answers.append((rows, found))
        for _, found in answers:
            _count(use, found)
        return _reply(answers, call)

    def _excluded(self, call: RouterCall, rows: Tensor | None) -> list[ExampleRef]:
        if not self.exclude:
            return []
        tokens_each, left_over = divmod(len(call.router_input), len(self.exclude))
        if left_over:
            raise BadInput(
                f"exclude: got {len(self.exclude)} examples for {len(call.router_input)} tokens, "
                "expected one per sequence of the batch"
            )
        every = [ref for ref in self.exclude for _ in range(tokens_each)]
        return every if rows is None else [every[row] for row in rows.tolist()]


# Rows [n] of a call (None = all of them), and what the memory said about them.
Answer = tuple[Tensor | None, Retrieved]


def _rows_to_ask(call: RouterCall) -> Sequence[Tensor | None]:
    """Row numbers [n] int64 that are not padding, a tensor per request; None = all rows, which needs no copy."""
    most = tokens_per_request(call.router_input, call.router_logits)
    if call.valid is not None and not bool(call.valid.all()):
        valid = call.valid.nonzero().flatten()
        return torch.split(valid, most) if len(valid) else ()
    tokens = len(call.router_input)
    if tokens <= most:
        return [None]
    return torch.split(torch.arange(tokens, device=call.router_input.device), most)


def tokens_per_request(router_input: Tensor, router_logits: Tensor) -> int:
    """Tokens [T, d] and logits [T, N] that go in one request: as many as MAX_REQUEST_BYTES hold, one at least."""
    token_bytes = sum(t.shape[1] * t.element_size() for t in (router_input, router_logits))
    return max(1, MAX_REQUEST_BYTES // token_bytes)


def _select(call: RouterCall, rows: Tensor | None) -> tuple[Tensor, Tensor, Assignment]:
    own = Assignment(call.weights, call.experts)
    if rows is None:
        return call.router_input, call.router_logits, own
    return (
        call.router_input[rows],
        call.router_logits[rows],
        Assignment(own.weights[rows], own.experts[rows]),
    )


def _count(use: LayerUse, found: Retrieved) -> None:
    use.tokens += len(found.lambdas)
    use.abstained += int(found.abstained.count_nonzero())
    use.lambda_sum += float(found.lambdas.sum())


def _reply(answers: Sequence[Answer], call: RouterCall) -> Assignment | Logits | None:
    """The own routing with the answered rows in it; None when every token abstained."""
    reply: Assignment | Logits | None = None
    for rows, found in answers:
        if isinstance(found.blended, Logits):
            own = reply.router_logits if isinstance(reply, Logits) else call.router_logits
            reply = Logits(_merged(own, found.blended.router_logits, rows))
        elif found.blended is not None:
            before = reply if isinstance(reply, Assignment) else None
            reply = _with_rows(before, call, found.blended, rows)
    return reply


def _with_rows(
    before: Assignment | None, call: RouterCall, blended: Assignment, rows: Tensor | None
) -> Assignment:
    own = before or Assignment(call.weights, call.experts)
    width = blended.experts.shape[1]
    return Assignment(
        _merged(_widened(own.weights, width), blended.weights, rows),
        _merged(_widened(own.experts, width), blended.experts, rows),
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
