"""Change the routers' raw logits inside their own forward, and ask what a router makes of logits.

`LogitTap` is for work on logits that must see gradients, or must change the logits whatever the
router's input is. To route with a memory use `router_hooks.RouterHooks`, which is cheaper.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from model_runner.architectures.discovery import find_router_sites
from model_runner.architectures.families import Assignment, RouterSite, swapped_logits
from model_runner.errors import HooksInUse

LogitFunction = Callable[[RouterSite, Tensor], Tensor]
Forward = Callable[..., Any]


class LogitTap:
    """Within it, each router goes on with `fn(site, logits)` in place of its raw logits.

    Gradients flow through `fn`. Taps on the same model nest; the inner one sees the logits first.
    Within a `RouterHooks` context a `Logits` reply passes the tap too, so that `fn` also sees
    the logits that the policy chose.

    Args:
        model: a Mixture-of-Experts model.
        fn: gets a site and `[T, num_logits]` in the router's own dtype (fp32 or the model's),
            gives the same shape. It runs again for the same layer when the policy of an
            enclosing `RouterHooks` replies `Logits`, and under gradient checkpointing.
        sites: the sites to tap; all of the model's when None.

    Raises:
        UnsupportedModel: the model has no routers, or a router's logits were not found.
        HooksInUse: this tap is already active.

    """

    def __init__(
        self, model: nn.Module, fn: LogitFunction, sites: Sequence[RouterSite] | None = None
    ) -> None:
        self.sites = tuple(find_router_sites(model) if sites is None else sites)
        self._fn = fn
        self._undo: ExitStack | None = None

    def __enter__(self) -> LogitTap:
        if self._undo is not None:
            raise HooksInUse("this LogitTap is already active")
        self._undo = ExitStack()
        for site in self.sites:
            self._undo.enter_context(wrapped_forward(site.router, self._tapped(site)))
        return self

    def __exit__(self, *_: object) -> None:
        undo, self._undo = self._undo, None
        if undo is not None:
            undo.close()

    def _tapped(self, site: RouterSite) -> Callable[[Forward], Forward]:
        def wrap(forward: Forward) -> Forward:
            @functools.wraps(forward)
            def tapped(*args: Any, **kwargs: Any) -> Any:
                with swapped_logits(site, functools.partial(self._fn, site)):
                    return forward(*args, **kwargs)

            return tapped

        return wrap


@contextmanager
def wrapped_forward(module: nn.Module, wrap: Callable[[Forward], Forward]) -> Iterator[None]:
    """Puts `wrap(module.forward)` in the place of `module.forward`, then puts it back.

    A forward that others have replaced on the instance (accelerate does, to offload weights)
    stays in use below, and is restored as it was.
    """
    attributes = vars(module)
    instance_forward = attributes.get("forward")
    attributes["forward"] = wrap(module.forward)
    try:
        yield
    finally:
        if instance_forward is None:
            del attributes["forward"]
        else:
            attributes["forward"] = instance_forward


def family_assignment(
    site: RouterSite,
    logits: Tensor,
    router_args: tuple[Any, ...],
    router_kwargs: Mapping[str, Any] | None = None,
) -> Assignment:
    """pi(logits): the assignment that the family's own code makes of other router logits.

    Args:
        site: the router.
        logits: `[T, num_logits]`, any floating dtype; cast to the router's own.
        router_args: positional arguments of the router's own call on these T tokens. The hidden
            states' values do not matter, their shape does; some families read more (a bias,
            token ids, the previous router's states).
        router_kwargs: keyword arguments of the same call.

    Returns:
        weights `[T, k]` and experts `[T, k]` int64. For the router's own logits they equal the
        model's bit for bit.

    Raises:
        UnsupportedModel: the router's logits were not found.
        BadInput: `logits` has another shape than the router's.

    """
    output = site.family.reassign(site, logits, router_args, router_kwargs or {})
    _, weights, experts = site.family.read(output)
    return Assignment(weights, experts)
