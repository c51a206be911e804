"""One operation in the place of a router's lookup, which torch.compile takes as it is: the model stays one graph.

    weights, experts = route(router_input, router_logits, weights, experts, key_of(router), width)

What the operation does is said by `answering`, by key, when it runs; without it the own routing comes back. So a model
that was compiled within one RouterHooks runs within another, and as itself outside of them, as it is.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from model_runner.architectures.families import Assignment
from model_runner.errors import BadInput

Answer = Callable[[Tensor, Tensor, Tensor, Tensor], Assignment | None]
"""Of router input [T, d], logits [T, N], own weights and experts [T, k]; None: the own routing stands."""

_keys: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_next_key = itertools.count()
_answers: dict[int, Answer] = {}
_registering = threading.Lock()


def key_of(router: nn.Module) -> int:
    """The number of a router, the same as long as it lives."""
    with _registering:
        if router not in _keys:
            _keys[router] = next(_next_key)
        return _keys[router]


@contextmanager
def answering(key: int, answer: Answer) -> Iterator[None]:
    """Within it `route` gives what `answer` gives, for this key, in every thread."""
    with _registering:
        _answers[key] = answer
    try:
        yield
    finally:
        with _registering:
            del _answers[key]


@torch.library.custom_op("knn_moe::route", mutates_args=())
def route(
    router_input: Tensor,
    router_logits: Tensor,
    weights: Tensor,
    experts: Tensor,
    key: int,
    width: int,
) -> tuple[Tensor, Tensor]:
    """Weights and experts [T, width] in the dtypes of the own ones [T, k]; gradients do not flow through it.

    Raises BadInput when the answer is of another width than was compiled.
    """
    answer = _answers.get(key)
    found = None if answer is None else answer(router_input, router_logits, weights, experts)
    if found is None:
        return _widened(weights, width), _widened(experts, width)
    if found.experts.shape[1] != width:
        raise BadInput(
            f"the model was compiled for {width} experts per token, and the memory's answers have "
            f"{found.experts.shape[1]} now (its K or support was changed): call torch.compiler.reset() and run it again"
        )
    return found.weights.to(weights), found.experts.to(experts)


@route.register_fake
def _(
    router_input: Tensor,
    router_logits: Tensor,
    weights: Tensor,
    experts: Tensor,
    key: int,
    width: int,
) -> tuple[Tensor, Tensor]:
    tokens = router_input.shape[0]
    return weights.new_empty(tokens, width), experts.new_empty(tokens, width)


def _widened(own: Tensor, width: int) -> Tensor:
    """A copy of own columns [T, k], padded to `width` with zeros: expert 0 at weight 0."""
    return torch.nn.functional.pad(own, (0, width - own.shape[1])).clone()
