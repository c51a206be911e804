"""Negative log-likelihood of texts: of the plain model, with a policy, by the oracle; paired differences."""

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

from model_runner.architectures.families import Assignment
from model_runner.errors import BadInput
from model_runner.memory_builder.objective import router_gradients
from model_runner.memory_builder.recipes import Recipe, entry_values
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


@dataclass(frozen=True, slots=True)
class Difference:
    """Change of NLL per token in nats (negative is better), with the standard error of paired differences."""

    delta: float
    se: float
    windows: int


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
                return _logits(model, batch)
            with RouterHooks(model, policy) as hooks:
                logits = _logits(model, batch)
                hooks.assert_complete()
                return logits

    return _losses(model, windows, logits_of, progress, what, batch_size)


def oracle_scores(
    model: nn.Module,
    windows: Sequence[Window],
    recipe: Recipe,
    progress: Progress,
    *,
    batch_size: int = 16,
) -> Scores:
    """Scores with the assignments that `recipe` makes of the scored tokens' own gradients.

    It sees the answers: a bound, not a method.
    """

    def logits_of(batch: Batch) -> Tensor:
        values = _own_assignments(model, batch, recipe)
        with RouterHooks(model, lambda call: values[call.site.layer]):
            return _logits(model, batch)

    return collected(_losses(model, windows, logits_of, progress, "oracle", batch_size))


def _losses(
    model: nn.Module,
    windows: Sequence[Window],
    logits_of: Callable[[Batch], Tensor],
    progress: Progress,
    what: str,
    batch_size: int,
) -> Iterator[tuple[Batch, Tensor]]:
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


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    logits: Tensor = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).logits
    return logits


def _own_assignments(model: nn.Module, batch: Batch, recipe: Recipe) -> list[Assignment]:
    def loss(logits: Tensor) -> Tensor:
        return token_nll(logits, batch).sum()

    traces = router_gradients(model, batch.input_ids, loss, attention_mask=batch.attention_mask)
    every = torch.arange(batch.input_ids.numel(), device=batch.input_ids.device)
    values = [entry_values(t, recipe, 1.0, every, torch.Generator()) for t in traces]
    return [v for v in values if isinstance(v, Assignment)]


@contextmanager
def _without_own(policy: Policy | None, group: Sequence[Window]) -> Iterator[None]:
    """Within it, the policy reads no entry of a window's own example."""
    if not isinstance(policy, RetrievalPolicy):
        raise BadInput("leave_one_out needs a RetrievalPolicy: only it reads a memory")
    with policy.excluding([w.ref for w in group]):
        yield


def difference(scores: Scores, baseline: Scores) -> Difference:
    """Paired change of NLL; the standard error is that of a ratio, clustered by example.

    Both must be scores of the same windows in the same order.
    """
    _require_same_windows(scores, baseline)
    changes = scores.nll_sums - baseline.nll_sums
    total = scores.targets.sum()
    delta = float(changes.sum() / total)
    residuals = _by_example(changes - delta * scores.targets, scores.examples)
    clusters = len(residuals)
    se = math.nan
    if clusters > 1:
        se = float(np.sqrt((residuals**2).sum() * clusters / (clusters - 1)) / total)
    return Difference(delta, se, len(changes))


def bootstrap_interval(
    scores: Scores, baseline: Scores, *, seed: int, draws: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the change of NLL per token, by resampling examples; NaN for a single example."""
    _require_same_windows(scores, baseline)
    rng = np.random.default_rng(seed)
    changes = _by_example(scores.nll_sums - baseline.nll_sums, scores.examples)
    targets = _by_example(scores.targets, scores.examples)
    if len(changes) < 2:
        return math.nan, math.nan
    picks = rng.integers(0, len(changes), size=(draws, len(changes)))
    deltas = changes[picks].sum(axis=1) / targets[picks].sum(axis=1)
    low, high = np.quantile(deltas, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _require_same_windows(scores: Scores, baseline: Scores) -> None:
    if scores.examples != baseline.examples or (scores.targets != baseline.targets).any():
        raise BadInput("paired differences need scores of the same windows in the same order")


def _by_example(values: F64, examples: Sequence[ExampleRef]) -> F64:
    """Sums over the windows of each example."""
    number = {ref: i for i, ref in enumerate(dict.fromkeys(examples))}
    return np.bincount([number[ref] for ref in examples], weights=values).astype(np.float64)
