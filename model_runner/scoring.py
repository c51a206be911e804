"""Loss of windows of text, of the plain model or with a policy: memories are made and judged by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from knnmoe.client import ExampleRef
from numpy.typing import NDArray
from torch import Tensor, nn

from model_runner.errors import BadInput
from model_runner.progress import Progress
from model_runner.router_hooks import Policy, RouterHooks, require_no_nan
from model_runner.routing_policy import RetrievalPolicy
from model_runner.texts import Batch, Window, batched, make_batch, token_nll

Scalar = TypeVar("Scalar", bound=np.generic)
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Scores:
    """Loss of W windows.

    Attributes:
        nll_sums: [W] nats over the window's targets.
        targets: [W] tokens whose loss counts.
        examples: the example of each window; windows of one example are not independent.
        windows: they themselves, longest first.
        token_nll: of each window f32 [targets], nats of each target.

    """

    nll_sums: F64
    targets: F64
    examples: tuple[ExampleRef, ...]
    windows: tuple[Window, ...] = ()
    token_nll: tuple[F32, ...] = ()

    @property
    def nll(self) -> float:
        """Nats per token."""
        return float(self.nll_sums.sum() / self.targets.sum())

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return math.exp(self.nll)


def score(
    model: nn.Module,
    windows: Sequence[Window],
    policy: Policy | None,
    progress: Progress,
    *,
    what: str,
    batch_size: int = 16,
    leave_one_out: bool = False,
) -> Scores:
    """Scores windows with the model's own router (policy None) or a policy's.

    leave_one_out: a RetrievalPolicy never reads an entry of the window's own example (for scores on reference text).
    Raises UnsupportedModel when the model gives NaN.
    """
    return collected(
        losses(
            *(model, windows, policy, progress),
            what=what,
            batch_size=batch_size,
            leave_one_out=leave_one_out,
        )
    )


def losses(
    model: nn.Module,
    windows: Sequence[Window],
    policy: Policy | None,
    progress: Progress,
    *,
    what: str,
    batch_size: int = 16,
    leave_one_out: bool = False,
) -> Iterator[tuple[Batch, Tensor]]:
    """What `score` adds up, batch by batch: the loss f32 [B, S] of each token's successor. Raises as `score`."""

    def logits_of(batch: Batch) -> Tensor:
        with _without_own(policy, batch.windows) if leave_one_out else nullcontext():
            if policy is None:
                return plain_logits(model, batch)
            with RouterHooks(model, policy) as hooks:
                logits = plain_logits(model, batch)
                hooks.assert_complete()
                return logits

    return losses_of(model, windows, logits_of, progress, what, batch_size)


def losses_of(
    model: nn.Module,
    windows: Sequence[Window],
    logits_of: Callable[[Batch], Tensor],
    progress: Progress,
    what: str,
    batch_size: int,
) -> Iterator[tuple[Batch, Tensor]]:
    """The loss f32 [B, S] of each token's successor with `logits_of`, batch by batch. Raises as `score`."""
    device = next(model.parameters()).device
    groups = list(batched(windows, batch_size))
    for group in progress.track(groups, what, unit="batches"):
        batch = make_batch(group, device)
        with torch.no_grad():
            logits = logits_of(batch)
        nll = token_nll(logits, batch)
        if bool(nll.isnan().any()):
            refs = {f"{w.ref.source} {w.ref.example}": None for w in batch.windows}
            inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
            require_no_nan(model, logits, inputs, of=f"one of {', '.join(refs)}")
        yield batch, nll


def collected(scored: Iterable[tuple[Batch, Tensor]]) -> Scores:
    """Scores of batches with the loss f32 [B, S] of each token's successor; 0 where it does not count."""
    sums, order, tokens = list[F64](), list[Window](), list[F32]()
    for batch, nll in scored:
        # Sums of thousands of tokens in f64: differences of two runs are taken afterwards.
        sums.append(nll.double().sum(dim=1).cpu().numpy())
        order += batch.windows
        tokens += by_window(nll[batch.predicts].cpu().numpy(), batch.windows)
    return Scores(
        np.concatenate(sums),
        np.array([w.targets for w in order], dtype=np.float64),
        tuple(w.ref for w in order),
        tuple(order),
        tuple(tokens),
    )


def by_window(rows: NDArray[Scalar], windows: Sequence[Window]) -> list[NDArray[Scalar]]:
    """Rows [n, ...] of all targets of a batch, cut into those of each window."""
    return np.split(rows, np.cumsum([w.targets for w in windows])[:-1])


def plain_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Of a forward pass as the model is now: [B, S, vocabulary]."""
    logits: Tensor = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).logits
    return logits


@contextmanager
def _without_own(policy: Policy | None, group: Sequence[Window]) -> Iterator[None]:
    """Within it, the policy reads no entry of a window's own example."""
    if not isinstance(policy, RetrievalPolicy):
        raise BadInput("leave_one_out needs a RetrievalPolicy: only it reads a memory")
    with policy.excluding([w.ref for w in group]):
        yield
