"""Let a policy see, and replace, what every MoE layer's router decides.

Way through: a router runs -> its output is read -> the policy gets a `RouterCall` -> its reply
is fitted to the family and put in the output's place. Nothing is patched, and after the context
the model is as it was. What a policy does (a lookup over the network, a blend) is not known here.

Hooks that were installed after torch.compile has compiled are not seen by it. Of a policy that knows
the width of its replies beforehand (`width`, a retriever beside the model) a hook becomes one operation
(route_operation.py), and the model stays one graph; of any other it is opaque Python, which breaks it.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from knnmoe.tracing import span
from torch import Tensor, nn

from model_runner import route_operation
from model_runner.architectures.discovery import decoder_of, find_router_sites
from model_runner.architectures.families import (
    Assignment,
    Family,
    OnOutput,
    RouterArgs,
    RouterKwargs,
    RouterOutput,
    RouterSite,
    uncompiled,
)
from model_runner.errors import BadInput, HookBypassed, HooksInUse, UnsupportedModel
from model_runner.logit_tap import LogitTap, wrapped_forward
from model_runner.lookup_lock import LookupLock

# Kept beside the models, not on them: a marker on a module would be copied with it.
_hooked_routers: WeakSet[nn.Module] = WeakSet()
_hooking = threading.Lock()
# By decoder: hooks that are entered within a pause hold back the same passes as those that were paused.
_passes: WeakKeyDictionary[nn.Module, _Passes] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class RouterCall:
    """What one router saw and decided in one forward pass over T = B*S tokens.

    Attributes:
        site: the router.
        router_input: `[T, d]` in the model's dtype, row-major over (B, S).
        router_logits: `[T, num_logits]`, the output of the router's last linear map, before
            softmax, bias or capping. Some families return it cast to fp32.
        weights: `[T, k]` the model's own, in the family's scale and dtype.
        experts: `[T, k]` int64, the model's own.
        batch_shape: (B, S) of this forward pass; None if the decoder was not seen.
        valid: `[T]` bool, False on padding; None = all valid, or no 2-D attention mask given.

    """

    site: RouterSite
    router_input: Tensor
    router_logits: Tensor
    weights: Tensor
    experts: Tensor
    batch_shape: tuple[int, int] | None
    valid: Tensor | None


@dataclass(frozen=True, slots=True)
class Logits:
    """A policy's reply in logit space.

    Attributes:
        router_logits: `[T, num_logits]`; the family's own code turns them into the assignment.

    """

    router_logits: Tensor


Policy = Callable[[RouterCall], Assignment | Logits | None]
"""None leaves the model's own router standing, bit for bit.

A policy may have a method `width(top_k) -> int | None`: how many experts per token its assignments name, for a router
that uses top_k; None when it does not know. Then it is asked by one operation within compiled code.
It may have `routed`, a function that hears of each call and of the assignment that the experts follow, outside compiled
code; None: nobody does.
"""


class RouterHooks:
    """Context manager: within it, `policy` is asked at every MoE layer of `model`.

        with RouterHooks(model, policy) as hooks:
            model(**batch)
            hooks.assert_complete()

    Replies are cast to the model's own dtypes and devices. Rows of a reply that belong to padding
    are applied like any other: they change nothing that a valid token can see.

    Threads may call the model at the same time; `policy` is then called from all of them. Enter
    before they begin and leave when they have ended: a forward pass that is cut off by leaving
    raises HooksInUse in its own thread.

    Within compiled code, where the model is one graph (see the module), the policy sees no padding and no shape of the
    batch: padded tokens are looked up like others, and change nothing that a valid token can see. A CUDA graph that is
    replayed does not count hits.

    Args:
        model: a Mixture-of-Experts causal LM; its weights are never read or written.
        policy: see `Policy`; its exceptions leave `model(...)` unchanged.

    Attributes:
        sites: the routers, one per MoE layer.
        hits: calls of each layer's router since the context was entered, by all threads.

    Raises:
        UnsupportedModel: the model has no routers that can be hooked.
        HooksInUse: this model is already hooked; or the context was left during a forward pass.
        BadInput: a reply has the wrong type, shape, or an expert id out of range.

    """

    def __init__(self, model: nn.Module, policy: Policy) -> None:
        self.sites = find_router_sites(model)
        self.hits = [0] * len(self.sites)
        self._model = model
        self._policy = policy
        self._counting = threading.Lock()
        self._here = _ThreadState(len(self.sites))
        self._passes = _passes_of(model)
        self._undo: ExitStack | None = None
        self._attached = ExitStack()

    def __enter__(self) -> RouterHooks:
        with ExitStack() as undo:
            here = _ThreadState(len(self.sites))
            widths = self._attach(here)
            undo.callback(self._detach)
            self.hits[:] = [0] * len(self.sites)
            self._here = here
            # Last, so that it is left first: a pass that goes on meanwhile must not look complete.
            traced = None not in widths
            undo.enter_context(watched_batches(self._model, here, traced=traced))
            self._undo = undo.pop_all()
        return self

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within it this thread has the plain model to itself, e.g. to learn from.

        Waits for the forward passes of other threads; those that begin meanwhile wait for its end. Neither is known of
        one in compiled code. Raises HooksInUse when the context was not entered.
        """
        if self._undo is None:
            raise HooksInUse("these RouterHooks were not entered, and cannot be paused")
        with self._passes.lock.committing():
            self._detach()
            self._here.pausing, self._passes.pausing = True, threading.get_ident()
            try:
                yield
            finally:
                self._here.pausing, self._passes.pausing = False, None
                self._attach(self._here)

    def _attach(self, here: _ThreadState) -> list[int | None]:
        """Hooks the routers until `_detach`; returns the width of each one's replies, as far as known."""
        routers = [site.router for site in self.sites]
        to_tap = [site for site in self.sites if not site.family.returns_raw_logits]
        with ExitStack() as undo:
            with _hooking:
                if any(router in _hooked_routers for router in routers):
                    raise HooksInUse(
                        f"{type(self._model).__name__} is already hooked; leave the other "
                        "RouterHooks, or RoutingMemory, first"
                    )
                _hooked_routers.update(routers)
                undo.callback(_unhook, routers)
            keep_logits = uncompiled(here.keep_logits)
            undo.enter_context(LogitTap(self._model, keep_logits, to_tap))
            widths = [self._width(site) for site in self.sites]
            for site, width in zip(self.sites, widths, strict=True):
                on_output = self._on_output(site, here)
                if width is not None:
                    key = route_operation.key_of(site.router)
                    undo.enter_context(route_operation.answering(key, self._answer(site, here)))
                    on_output = _one_operation(on_output, site.family, key, width)
                for handle in site.family.attach(site, on_output):
                    undo.callback(handle.remove)
            self._attached = undo.pop_all()
        return widths

    def _detach(self) -> None:
        self._attached.close()

    def __exit__(self, *_: object) -> None:
        undo, self._undo = self._undo, None
        if undo is not None:
            undo.close()

    def assert_complete(self) -> None:
        """Every MoE layer was hooked since the context was entered, or since the last check.

        Counts what the calling thread ran; where it ran nothing, what all threads did.

        Raises:
            HookBypassed: names the layers whose router was not called.

        """
        here = self._here
        ran = [hits - before for hits, before in zip(self.hits, here.checked_hits, strict=True)]
        hits = here.hits if any(here.hits) else ran
        missed = [site.name for site in self.sites if not hits[site.layer]]
        here.hits, here.checked_hits = [0] * len(self.sites), list(self.hits)
        if missed:
            raise HookBypassed(missed)

    def _on_output(self, site: RouterSite, here: _ThreadState) -> OnOutput:
        routed = getattr(self._policy, "routed", None)

        @uncompiled
        def on_output(args: RouterArgs, kwargs: RouterKwargs, output: Any) -> Any:
            self._count(site, here)
            own = site.family.read(output)
            call = _call(site, own, site.router_input(args, kwargs), here)
            reply = self._policy(call)
            replaced = None
            if isinstance(reply, Logits):
                replaced = site.family.reassign(site, reply.router_logits, args, kwargs)
            elif reply is not None:
                replaced = site.family.write(output, _fitted(reply, own, site))
            if routed is not None:
                now = own if replaced is None else site.family.read(replaced)
                routed(call, Assignment(now.weights, now.experts))
            return replaced

        return on_output

    def _answer(self, site: RouterSite, here: _ThreadState) -> route_operation.Answer:
        """What `on_output` does, within compiled code."""

        def answer(
            router_input: Tensor, router_logits: Tensor, weights: Tensor, experts: Tensor
        ) -> Assignment | None:
            self._count(site, here)
            call = RouterCall(site, router_input, router_logits, weights, experts, None, None)
            reply = self._policy(call)
            if isinstance(reply, Logits):
                output = site.family.reassign(site, reply.router_logits, (router_input,), {})
                return Assignment(*site.family.read(output)[1:])
            return reply

        return answer

    def _width(self, site: RouterSite) -> int | None:
        """Experts per token of every reply, where it is known and the router is of the generic family."""
        width = getattr(self._policy, "width", None)
        if width is None or type(site.family) is not Family or not site.family.returns_raw_logits:
            return None
        found: int | None = width(site.top_k)
        return found

    def _count(self, site: RouterSite, here: _ThreadState) -> None:
        here.hits[site.layer] += 1
        with self._counting:
            self.hits[site.layer] += 1


def _one_operation(on_output: OnOutput, family: Family, key: int, width: int) -> OnOutput:
    """`on_output`, and within compiled code one operation in its place: no lock, no state, no break of the graph."""

    def traced(args: RouterArgs, kwargs: RouterKwargs, output: Any) -> Any:
        # A router that reads more than hidden states could not be run again from within the operation.
        if not torch.compiler.is_compiling() or kwargs or len(args) != 1:
            return on_output(args, kwargs, output)
        hidden_states = args[0].reshape(-1, args[0].shape[-1])
        routed = route_operation.route(hidden_states, *family.read(output), key, width)
        return family.write(output, Assignment(*routed))

    return traced


def _unhook(routers: Sequence[nn.Module]) -> None:
    with _hooking:
        _hooked_routers.difference_update(routers)


def _call(
    site: RouterSite, own: RouterOutput, router_input: Tensor, here: _ThreadState
) -> RouterCall:
    batch_shape, valid = here.batch_shape, here.valid
    tokens = router_input.shape[0]
    if batch_shape is not None and batch_shape[0] * batch_shape[1] != tokens:
        batch_shape = valid = None
    return RouterCall(
        site=site,
        router_input=router_input,
        router_logits=here.raw_logits.pop(site.layer, own.router_logits),
        weights=own.weights,
        experts=own.experts,
        batch_shape=batch_shape,
        valid=valid,
    )


class _ThreadState(threading.local):
    """What the calling thread's forward pass is at; every thread has its own.

    Attributes:
        batch_shape: (B, S) of the tokens now in the decoder; None outside a forward pass.
        valid: `[B*S]` bool, False on padding; None when no 2-D attention mask was given. A mask
            that transformers has already expanded to 4-D (static caches) is not read.
        raw_logits: by layer, from the router's forward until the policy is asked.
        hits: calls of each layer's router by this thread since its last check.
        checked_hits: those of all threads at its last check.
        pausing: this thread has paused the hooks.

    """

    def __init__(self, layers: int) -> None:
        self.batch_shape: tuple[int, int] | None = None
        self.valid: Tensor | None = None
        self.raw_logits: dict[int, Tensor] = {}
        self.hits = [0] * layers
        self.checked_hits = [0] * layers
        self.pausing = False

    def keep_logits(self, site: RouterSite, logits: Tensor) -> Tensor:
        """A LogitFunction that changes nothing."""
        self.raw_logits[site.layer] = logits
        return logits


@contextmanager
def watched_batches(
    model: nn.Module, here: _ThreadState, *, traced: bool = False
) -> Iterator[None]:
    """Within it, `here` has shape and padding of the thread's forward pass through the decoder of `model`.

    Routers see tokens flattened to `[B*S, d]` and never the padding mask; the decoder sees both.
    traced: compiled code does not note them, and is one graph.
    """
    inside, decoder, passes = True, decoder_of(model), _passes_of(model)

    def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
        parameters = tuple(inspect.signature(forward).parameters)

        @functools.wraps(forward)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if here.pausing:
                return forward(*args, **kwargs)
            before = here.batch_shape, here.valid
            given = dict(zip(parameters, args, strict=False)) | kwargs
            with passes.one():
                if not inside:  # it waited for a pause, in which these hooks came and went
                    return decoder.forward(*args, **kwargs)
                here.batch_shape, here.valid = _batch_of(given)
                try:
                    with span("forward", model=type(model).__name__):
                        output = forward(*args, **kwargs)
                finally:
                    here.batch_shape, here.valid = before
            if not inside:
                raise HooksInUse(
                    f"the RouterHooks of {type(model).__name__} was left while this forward pass ran, in part with "
                    "its policy and in part without; leave it when the threads that call the model have ended"
                )
            return output

        opaque = uncompiled(watched, recursive=False)  # what it calls is compiled
        if not traced:
            return opaque

        @functools.wraps(forward)
        def watched_unless_compiled(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return forward(*args, **kwargs)
            return opaque(*args, **kwargs)

        return watched_unless_compiled

    with wrapped_forward(decoder, wrap):
        try:
            yield
        finally:
            inside = False


@dataclass(slots=True)
class _Passes:
    """Forward passes through one decoder, and pauses in which there are none but of one thread.

    Attributes:
        pausing: that thread.

    """

    lock: LookupLock = field(default_factory=LookupLock)
    pausing: int | None = None

    def one(self) -> AbstractContextManager[None]:
        """Around a pass of the calling thread."""
        return nullcontext() if self.pausing == threading.get_ident() else self.lock


def _passes_of(model: nn.Module) -> _Passes:
    with _hooking:
        return _passes.setdefault(decoder_of(model), _Passes())


def _batch_of(given: Mapping[str, Any]) -> tuple[tuple[int, int] | None, Tensor | None]:
    """Shape and padding, from the decoder's arguments by name."""
    tokens = given.get("input_ids")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    batch_shape = None if tokens is None else (tokens.shape[0], tokens.shape[1])
    return batch_shape, _valid_tokens(given.get("attention_mask"), batch_shape)


def _valid_tokens(mask: Any, batch_shape: tuple[int, int] | None) -> Tensor | None:
    if batch_shape is None or not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    sequence_length = batch_shape[1]
    if mask.shape[0] != batch_shape[0] or mask.shape[1] < sequence_length:
        return None
    # With a KV cache the mask also covers the past: the current tokens are its last columns.
    return mask[:, mask.shape[1] - sequence_length :].to(torch.bool).reshape(-1)


def _fitted(reply: Assignment, own: RouterOutput, site: RouterSite) -> Assignment:
    """The reply in the model's dtypes, on its device."""
    if not isinstance(reply, Assignment):
        raise BadInput(f"a policy replies Assignment, Logits or None, not {type(reply).__name__}")
    experts, weights = reply.experts, reply.weights
    tokens = own.experts.shape[0]
    if experts.dim() != 2 or experts.shape[0] != tokens or experts.shape != weights.shape:
        raise BadInput(
            f"{site.name}: an assignment for {tokens} tokens has weights and experts "
            f"[{tokens}, k], got {list(weights.shape)} and {list(experts.shape)}"
        )
    # On a GPU looking at the values would wait for it; replies of a sidecar arrive on the CPU.
    if experts.device.type == "cpu" and experts.numel():
        lowest, highest = (int(bound) for bound in experts.aminmax())
        if lowest < 0 or highest >= site.num_experts:
            raise BadInput(
                f"{site.name}: expert ids must lie in 0..{site.num_experts - 1}, "
                f"got {lowest}..{highest}"
            )
    return Assignment(weights.to(own.weights), experts.to(own.experts))


def verify_hooks(model: nn.Module) -> None:
    """Runs 1 x 4 tokens with and without an identity policy: the hooks must see all, change none.

    Call it once after loading. It catches kernels that go around the router, routers that return
    something else than their logits, and layers that run in another order than they are numbered.

    Raises:
        UnsupportedModel: no routers; the model gives NaN; or the identity policy changes its output.
        HookBypassed: some router was not called.
        BadInput: the model is in training mode, where its output is not a function of its input.

    """
    if model.training:
        raise BadInput("verify_hooks needs the model in eval mode: call model.eval() first")
    order: list[int] = []

    def identity(call: RouterCall) -> Assignment:
        order.append(call.site.layer)
        return Assignment(call.weights, call.experts)

    plain = _dummy_logits(model)
    require_no_nan(model, plain, _dummy_batch(model))
    with RouterHooks(model, identity) as hooks:
        hooked = _dummy_logits(model)
        hooks.assert_complete()
    if order != sorted(order) or len(order) != len(hooks.sites):
        raise UnsupportedModel(f"{type(model).__name__} runs its MoE layers in the order {order}")
    if not torch.equal(plain, hooked):
        raise UnsupportedModel(
            f"giving {type(model).__name__} its own assignments back changes its output by "
            f"{(plain - hooked).abs().max().item():.1e}: its router's output is not understood"
        )
    _verify_raw_logits(model, hooks.sites)


def _verify_raw_logits(model: nn.Module, sites: tuple[RouterSite, ...]) -> None:
    tapped: dict[int, Tensor] = {}

    def keep(site: RouterSite, logits: Tensor) -> Tensor:
        return tapped.setdefault(site.layer, logits)

    def compare(call: RouterCall) -> None:
        raw = tapped[call.site.layer]
        if not torch.equal(call.router_logits.to(raw.dtype), raw):
            raise UnsupportedModel(
                f"{call.site.name} returns something else than its raw logits; add "
                f"{type(call.site.router).__name__} to architectures/discovery.py, _CHANGED_LOGITS"
            )

    with LogitTap(model, keep, sites), RouterHooks(model, compare):
        _dummy_logits(model)


def _dummy_batch(model: nn.Module) -> dict[str, Any]:
    embeddings = getattr(decoder_of(model), "get_input_embeddings", lambda: None)()
    device = embeddings.weight.device if embeddings is not None else torch.device("cpu")
    device = torch.device("cpu") if device.type == "meta" else device
    return {"input_ids": torch.arange(4, device=device).unsqueeze(0), "use_cache": False}


@torch.no_grad()
def _dummy_logits(model: nn.Module) -> Tensor:
    output = model(**_dummy_batch(model))
    logits: Tensor = output.logits if hasattr(output, "logits") else output[0]
    return logits


def require_no_nan(
    model: nn.Module, logits: Tensor, batch: Mapping[str, Any], of: str = "a few token ids"
) -> None:
    """Raises UnsupportedModel when `logits`, which the model gave for `batch`, hold NaN; names where it comes from.

    of: what the batch is, for the message.
    """
    if not torch.isnan(logits).any():
        return
    bad_weights = [
        name
        for name, weight in model.named_parameters()
        if weight.device.type != "meta" and torch.isnan(weight).any()
    ]
    raise UnsupportedModel(
        f"the model gives NaN for {of}, first in {_first_with_nan(model, batch)}; "
        + (
            f"NaN is in its weights {', '.join(bad_weights[:3])}: load a checkpoint that is whole"
            if bad_weights
            else "its weights hold no NaN: try another dtype, e.g. float32"
        )
    )


@torch.no_grad()
def _first_with_nan(model: nn.Module, batch: Mapping[str, Any]) -> str:
    """The module whose output is the first with NaN, in one more pass with `batch`."""
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            parts = output if isinstance(output, tuple) else (output,)
            if any(isinstance(p, Tensor) and bool(torch.isnan(p).any()) for p in parts):
                found.append(name)

        return after

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    try:
        model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "its logits"
