"""Change the routers' raw logits inside their own forward, and ask what a router makes of logits.

`LogitTap` is for work on logits that must see gradients, or must change the logits whatever the
router's input is. To route with a memory use `router_hooks.RouterHooks`, which is cheaper.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from model_runner.architectures.discovery import find_router_sites
from model_runner.architectures.families import Assignment, RouterSite, swapped_logits
from model_runner.errors import HooksInUse

# By router: the threads that tap it, the innermost last. Taps of two threads would see each other's forward passes, and
# put each other's forward back.
_tapping: WeakKeyDictionary[nn.Module, list[int]] = WeakKeyDictionary()
_entering = threading.Lock()

LogitFunction = Callable[[RouterSite, Tensor], Tensor]
Forward = Callable[..., Any]


class LogitTap:
    """Within it, each router goes on with `fn(site, logits)` in place of its raw logits.

    Gradients flow through `fn`. Taps on the same model nest; the inner one sees the logits first.
    It sees the forward passes of all threads; only one thread at a time may tap a model.
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
        HooksInUse: this tap is already active, or another thread's is on the same model.

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
        with ExitStack() as undo:
            undo.enter_context(_only_thread([site.router for site in self.sites]))
            for site in self.sites:
                undo.enter_context(wrapped_forward(site.router, self._tapped(site)))
            self._undo = undo.pop_all()
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
def _only_thread(routers: Sequence[nn.Module]) -> Iterator[None]:
    """Raises HooksInUse while another thread taps one of the routers."""
    thread = threading.get_ident()
    with _entering:
        if any(thread not in _tapping.get(router, [thread]) for router in routers):
            raise HooksInUse(
                "another thread taps this model's routers (it learns, builds or is hooked); one at a time"
            )
        for router in routers:
            _tapping.setdefault(router, []).append(thread)
    try:
        yield
    finally:
        with _entering:
            for router in routers:
                _tapping[router].pop()
                if not _tapping[router]:
                    del _tapping[router]


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
