"""Let experts that the router did not choose receive a gradient, without changing the output.

In families that renormalise over the chosen k, only those k logits have a gradient, so a step
can demote an expert but never promote one. Here all N experts run, with the weights

    sparse + unselected * (p - stop_gradient(p))

whose value is the sparse assignment's and whose gradient reaches every logit. p is the family's
own score of each expert (softmax or sigmoid of the logits) in the family's own scale.

It cannot help llama4, whose scores multiply an expert's input: at score zero a gated expert's
output and its derivative are both zero.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from model_runner.architectures.site import Assignment, RouterArgs, RouterKwargs, RouterSite
from model_runner.logit_tap import Forward, wrapped_forward

Score = Callable[[Tensor], Tensor]


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


_SCORES: dict[Any, Score] = {
    torch.softmax: _softmax,
    F.softmax: _softmax,
    Tensor.softmax: _softmax,
    torch.sigmoid: torch.sigmoid,
    F.sigmoid: torch.sigmoid,
    Tensor.sigmoid: torch.sigmoid,
    F.logsigmoid: torch.sigmoid,
}


class _ScoreWatch(TorchFunctionMode):
    """Notes which scoring function a router calls first."""

    def __init__(self) -> None:
        super().__init__()
        self.score: Score | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if self.score is None:
            self.score = _SCORES.get(func)
        return func(*args, **(kwargs or {}))


@contextmanager
def straight_through(
    sites: Sequence[RouterSite], logits_of: Callable[[RouterSite], Tensor]
) -> Iterator[None]:
    """All experts of every site run, weighted as above, until the block is left.

    Args:
        sites: the routers.
        logits_of: the logits `[T, num_logits]` that the site's last call used, attached to the
            graph that the gradient is taken in.

    """
    scores: dict[int, Score] = {}
    with ExitStack() as stack:
        for site in sites:
            watch = functools.partial(_watched, site, scores)
            stack.enter_context(wrapped_forward(site.router, watch))
            densify = functools.partial(_densified, site, scores, logits_of)
            for handle in site.family.attach(site, densify):
                stack.callback(handle.remove)
        yield


def _watched(site: RouterSite, scores: dict[int, Score], forward: Forward) -> Forward:
    @functools.wraps(forward)
    def watched(*args: Any, **kwargs: Any) -> Any:
        with _ScoreWatch() as watch:
            output = forward(*args, **kwargs)
        scores[site.layer] = _own_score(site) or watch.score or _softmax
        return output

    return watched


def _own_score(site: RouterSite) -> Score | None:
    # deepseek_v4 and inkling2 name theirs (sqrt of softplus); it is a parameter-free module.
    score: Score | None = getattr(site.router, "score_fn", None)
    return score


def _densified(
    site: RouterSite,
    scores: dict[int, Score],
    logits_of: Callable[[RouterSite], Tensor],
    args: RouterArgs,
    kwargs: RouterKwargs,
    output: Any,
) -> Any:
    _, weights, experts = site.family.read(output)
    score = scores[site.layer](logits_of(site).float())[:, : site.num_experts]
    return site.family.write(output, dense_assignment(weights, experts, score))


def dense_assignment(weights: Tensor, experts: Tensor, score: Tensor) -> Assignment:
    """The same mixture over all N experts, with a gradient for each of them.

    Args:
        weights: `[T, k]` of the sparse assignment, attached to the graph.
        experts: `[T, k]` int64.
        score: `[T, N]` the family's score of each expert, attached to the graph.

    Returns:
        weights `[T, N]` of the dtype of `weights`, experts `[T, N]` int64 = 0..N-1.

    """
    in_scale = score * _scale(weights, experts, score)
    dense = torch.zeros_like(score, dtype=weights.dtype).scatter_add(1, experts, weights)
    gradient_only = (in_scale - in_scale.detach()).to(weights.dtype)
    unselected = (dense == 0).to(weights.dtype)
    expert_ids = torch.arange(score.shape[1], device=experts.device).expand_as(score)
    return Assignment(dense + unselected * gradient_only, expert_ids)


def _scale(weights: Tensor, experts: Tensor, score: Tensor) -> Tensor:
    """What one unit of score weighs `[T, 1]`: renormalisation and scaling, held fixed."""
    chosen_score = score.detach().gather(1, experts).sum(-1, keepdim=True)
    ratio = weights.detach().float().sum(-1, keepdim=True) / chosen_score
    # zaya's "skip" choice has no weight at all, which says nothing about the scale.
    return torch.where(ratio > 0, ratio, torch.ones_like(ratio))
