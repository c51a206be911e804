"""The retriever beside the model: lookups in a replica of a memory, without a sidecar on the way.

From router input to blended routing nothing waits for the host, shapes are static, and tensors stay at their addresses
while no layer grows: on CUDA a graph may hold lookups, and be replayed across commits. A graph goes on with what it has
captured of the host: K, kind, support, the layers that the memory speaks for, and that the replica could be used; it
counts hits and tokens. `LayerReplica.growths` and the log say when graphs must be captured again; reserve enough rows.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import grpc
import numpy as np
import torch
from knnmoe.client import ExampleRef, MemoryNotFound, ServiceUnavailable, blends_logits
from knnmoe.v1.types_pb2 import MemorySettings
from torch import Tensor

from model_runner.architectures.families import Assignment
from model_runner.lookup_lock import LookupLock
from model_runner.replica import arithmetic, native
from model_runner.replica.arithmetic import SMALLEST, LayerSettings
from model_runner.replica.first_pass import attach, require_choice
from model_runner.replica.layer import INFINITY, LayerReplica
from model_runner.replica.search import nearest
from model_runner.router_client import OnError
from model_runner.router_hooks import Logits
from model_runner.routing_policy import FellBack, Retrieved

# The number of an example that no entry came from.
_NO_EXAMPLE = -1
_NO_ROWS = np.zeros(0, np.int64)


class Copy(Protocol):
    """What a replica is; whoever fills it changes it within `lock.committing()`.

    Attributes:
        layers: by number; those that the settings speak for, all of them on `lock`.
        settings: every field is set.
        examples: the number of each example that an entry came from.
        complete: whether it may be used.

    """

    layers: dict[int, LayerReplica]
    settings: MemorySettings
    examples: dict[ExampleRef, int]
    complete: bool
    lock: LookupLock


def no_obstacle() -> None:
    """Of a copy that nobody follows: it never grows old."""


class ReplicaRetriever:
    """Answers lookups from a copy: see routing_policy.Retriever. Threads may share it.

    A token whose router input or logits are not finite keeps its own routing, as padding does; so does one whose router
    input is longer than 1.8e19, or of length 0 under cosine. They count as `not_finite`.

    Args:
        copy: the replica.
        num_experts: of the model.
        obstacle: why lookups must not use the copy now (it is too old, or closed); None: they may.
        first_pass: how layers on a CPU choose candidates: one of first_pass.CHOICES.
        on_error: what a lookup then does. FALL_BACK: the own router stands, with the error's cause as the reason, in
            an outage (ServiceUnavailable, MemoryNotFound); RAISE, and other errors: the error is raised.

    """

    def __init__(
        self,
        copy: Copy,
        num_experts: int,
        *,
        obstacle: Callable[[], Exception | None] = no_obstacle,
        on_error: OnError | str = OnError.FALL_BACK,
        first_pass: str = "auto",
    ) -> None:
        """Raises BadInput for another first pass."""
        self.copy, self.num_experts, self.on_error = copy, num_experts, OnError(on_error)
        self._first_pass = require_choice(first_pass)
        self._obstacle = obstacle
        self._settings: dict[int, tuple[MemorySettings, LayerSettings]] = {}

    @property
    def wants_logits(self) -> bool:
        """Whether the memory blends router logits rather than assignments."""
        return blends_logits(self.copy.settings.kind)

    def width(self, top_k: int) -> int | None:
        """Experts per token of blended assignments, for a model of this top-k; None before the copy is complete."""
        if not self.copy.complete:
            return None
        return LayerSettings.of(self.copy.settings, 0).width(top_k, self.num_experts)

    def lookup(
        self,
        layer: int,
        router_input: Tensor,
        router_logits: Tensor,
        own: Assignment,
        *,
        valid: Tensor | None = None,
        exclude: Sequence[ExampleRef] = (),
    ) -> Retrieved | FellBack:
        """See Retriever; the answer is on the device of the replica."""
        obstacle = self._obstacle()  # before the lock: in a forked process it may be held for ever
        if obstacle is not None:
            return self._fell_back(obstacle)
        with torch.no_grad(), self.copy.lock:
            settings, entries, missing = self._readable(layer)
            if missing is not None:
                return self._fell_back(missing)
            if entries is None:
                return _all_abstained(router_input, valid)
            if entries.first_pass is None:
                attach(entries, self._first_pass)
            asked = _Asked(router_input, router_logits, own, valid)
            left_out = self._left_out(exclude, len(router_input), entries.device)
            if left_out is None and _is_native(asked, entries, settings):
                return _answer_natively(asked, entries, settings)
            if left_out is None and _is_one_on_host(asked, entries, settings):
                return _answer_one(asked, entries, settings, self.num_experts)
            return _answer(asked, entries, settings, left_out, self.num_experts)

    def nearest_similarities(
        self,
        layer: int,
        router_input: Tensor,
        router_logits: Tensor,
        own: Assignment,
        exclude: Sequence[ExampleRef],
    ) -> Tensor:
        """f32 [T] on the host: that of the nearest key of another example than the token's in `exclude` [T]; or 0.

        Raises what is in the way, whatever on_error says.
        """
        obstacle = self._obstacle()
        if obstacle is not None:
            raise obstacle
        with torch.no_grad(), self.copy.lock:
            settings, entries, missing = self._readable(layer)
            if missing is not None:
                raise missing
            if entries is None:
                return torch.zeros(len(router_input))
            asked = _Asked(router_input, router_logits, own, None)
            queries, _ = _queries(asked, settings, entries.device)
            left_out = self._left_out(exclude, len(router_input), entries.device)
            _, distances = nearest(entries, queries, 1, left_out)
            return arithmetic.similarities(distances, settings)[:, 0].cpu()

    def _readable(
        self, layer: int
    ) -> tuple[LayerSettings, LayerReplica | None, ServiceUnavailable | None]:
        """How a layer is read; its entries, None: it has nothing to say; why it cannot be read. Within the lock."""
        settings, entries = self._settings_of(layer), self.copy.layers.get(layer)
        if not self.copy.complete or (settings.speaks and entries is None):
            return settings, None, _copied_anew()
        silent = entries is None or not settings.speaks or _is_empty(entries)
        return settings, None if silent else entries, None

    def _settings_of(self, layer: int) -> LayerSettings:
        settings = self.copy.settings
        cached = self._settings.get(layer)
        if cached is None or cached[0] is not settings:
            cached = self._settings[layer] = settings, LayerSettings.of(settings, layer)
        return cached[1]

    def _left_out(
        self, exclude: Sequence[ExampleRef], tokens: int, device: torch.device
    ) -> Tensor | None:
        """int64 [T]: for each token the number of the example whose entries it must not find."""
        if not exclude:
            return None
        numbers = [self.copy.examples.get(ref, _NO_EXAMPLE) for ref in exclude]
        of_sequences = torch.tensor(numbers, device=device)
        return of_sequences.repeat_interleave(tokens // len(exclude))

    def _fell_back(self, error: Exception) -> FellBack:
        if self.on_error is OnError.FALL_BACK and isinstance(
            error, ServiceUnavailable | MemoryNotFound
        ):
            return FellBack(error.cause)
        raise error


class _Asked(NamedTuple):
    """Tokens of one layer: input [T, d], logits [T, N], their own assignment [T, k], padding [T]."""

    router_input: Tensor
    router_logits: Tensor
    own: Assignment
    valid: Tensor | None


def _answer(
    asked: _Asked,
    entries: LayerReplica,
    settings: LayerSettings,
    left_out: Tensor | None,
    num_experts: int,
) -> Retrieved:
    queries, looked_up = _queries(asked, settings, entries.device)
    rows, distances = nearest(entries, queries, settings.neighbours, left_out)
    near = arithmetic.similarities(distances, settings)
    lambdas, shares = arithmetic.weights_of_memory(near, settings)
    answered = (lambdas > settings.min_lambda) & looked_up
    lambdas = torch.where(answered, lambdas, 0.0)
    flat_rows = rows.view(-1)
    values = entries.values.index_select(0, flat_rows).view(*rows.shape, -1)
    blended = _blended(asked, values, shares, lambdas, num_experts, settings)
    if isinstance(blended, Logits):
        own = asked.router_logits.to(entries.device)
        blended = Logits(torch.where(answered.unsqueeze(1), blended.router_logits, own))
    abstained = looked_up ^ answered
    counts = _counts(looked_up, abstained, lambdas, asked.valid)
    hits = (near >= arithmetic.MIN_SIMILARITY) & answered.unsqueeze(1)
    entries.count(flat_rows, hits.view(-1), counts)
    return Retrieved(lambdas, abstained, blended, counts)


def _is_one_on_host(asked: _Asked, entries: LayerReplica, settings: LayerSettings) -> bool:
    """Whether the lookup is of one token, and everything it reads lies where this code runs."""
    return (
        asked.router_input.shape[0] == 1
        and not settings.cosine
        and entries.device.type == "cpu"
        and asked.router_input.is_cpu
        and asked.router_logits.is_cpu
    )


def _is_native(asked: _Asked, entries: LayerReplica, settings: LayerSettings) -> bool:
    """Whether the lookup blends logits, and everything it reads lies where this code runs."""
    return (
        settings.logits
        and not settings.cosine
        and entries.device.type == "cpu"
        and asked.router_input.is_cpu
        and asked.router_logits.is_cpu
        and native.ready() is not None
    )


@lru_cache
def _as_native(settings: LayerSettings) -> native.Settings:
    return native.Settings(
        *(settings.gamma, settings.step_size, settings.null_weight, settings.min_lambda),
        *(arithmetic.MIN_SIMILARITY, SMALLEST, settings.logit_deltas),
    )


def _answer_natively(asked: _Asked, entries: LayerReplica, settings: LayerSettings) -> Retrieved:
    """`_answer` on the CPU, in as few calls as there can be: see native.py."""
    queries, own = asked.router_input.float().contiguous(), asked.router_logits.float().contiguous()
    if asked.valid is not None:  # padding may hold anything
        queries = torch.where(asked.valid.unsqueeze(1), queries, 0.0)
    tokens, experts = own.shape
    rows, distances = nearest(entries, queries, settings.neighbours)
    rows, distances = rows.contiguous(), distances.contiguous()
    blended, lambdas = torch.empty_like(own), torch.empty(tokens)
    abstained, counts = torch.empty(tokens, dtype=torch.bool), torch.empty(4, dtype=torch.float64)
    library = native.ready()
    assert library is not None  # noqa: S101
    with entries.counting():
        library.answer(
            *(
                ctypes.byref(_as_native(settings)),
                queries.data_ptr(),
                queries.shape[1],
                own.data_ptr(),
                experts,
            ),
            None if asked.valid is None else asked.valid.data_ptr(),
            *(rows.data_ptr(), distances.data_ptr(), settings.neighbours, tokens),
            *(entries.values.data_ptr(), blended.data_ptr(), lambdas.data_ptr()),
            *(abstained.data_ptr(), counts.data_ptr()),
            *(entries.hits.data_ptr(), entries.counts.data_ptr()),
        )
    return Retrieved(lambdas, abstained, Logits(blended.to(asked.router_logits.dtype)), counts)


def _answer_one(
    asked: _Asked, entries: LayerReplica, settings: LayerSettings, num_experts: int
) -> Retrieved:
    """`_answer` of one token on the CPU, in as few operations as there can be, since reading a number is free there.

    Between two lookups a decoding model reads 100 MB of weights: each of torch's operations then takes 10 to 25 us, its
    code and data come from RAM (2 cores, 2026-11-28).
    """
    query = asked.router_input.float()
    numbers = query.numpy()[0]
    finite = math.isfinite(float(numbers @ numbers) + float(asked.router_logits.float().sum()))
    valid = asked.valid is None or bool(asked.valid)
    if not (finite and valid):
        counts = entries.count_token(_NO_ROWS, 0.0, 0.0, float(valid), 0.0)
        return Retrieved(torch.zeros(1), torch.zeros(1, dtype=torch.bool), None, counts)
    rows, distances = nearest(entries, query, settings.neighbours)
    weight, shares, hits = arithmetic.weights_of_token(distances[0].tolist(), settings)
    if not weight > settings.min_lambda:
        counts = entries.count_token(_NO_ROWS, 1.0, 1.0, 0.0, 0.0)
        return Retrieved(torch.zeros(1), torch.ones(1, dtype=torch.bool), None, counts)
    values, lambdas = entries.values.index_select(0, rows[0]).unsqueeze(0), _as_tensor([weight])
    share_row = _as_tensor(shares).unsqueeze(0)
    blended = _blended(asked, values, share_row, lambdas, num_experts, settings)
    counts = entries.count_token(rows[0, :hits].numpy(), 1.0, 0.0, 0.0, weight)
    return Retrieved(lambdas, torch.zeros(1, dtype=torch.bool), blended, counts)


def _as_tensor(numbers: list[float]) -> Tensor:
    """f32, in a quarter of the time of torch.tensor."""
    return torch.from_numpy(np.array(numbers, np.float32))


def _blended(
    asked: _Asked,
    values: Tensor,
    shares: Tensor,
    lambdas: Tensor,
    num_experts: int,
    settings: LayerSettings,
) -> Assignment | Logits:
    """As if every token was answered; values f32 [T, K, W], shares f32 [T, K], lambdas f32 [T]."""
    if not settings.logits:
        return arithmetic.blended_assignment(
            asked.own, values, shares, lambdas, num_experts, settings
        )
    own = asked.router_logits.to(values.device)
    logits = arithmetic.blended_logits(own, values, shares, lambdas, settings)
    return Logits(logits.to(own.dtype))


def _queries(asked: _Asked, settings: LayerSettings, device: torch.device) -> tuple[Tensor, Tensor]:
    """What is searched for, f32 [T, d], and which tokens are looked up [T]; the others search for the zero vector."""
    queries = asked.router_input.to(device, torch.float32)
    lengths = torch.linalg.vector_norm(queries, dim=1)
    # A sum is finite if all its parts are.
    sums = lengths + asked.router_logits.to(device).sum(1, dtype=torch.float32)
    looked_up = sums.abs_() < INFINITY
    if settings.cosine:
        looked_up &= lengths > 0
        queries = queries / lengths.clamp_min(SMALLEST).unsqueeze(1)
    if asked.valid is not None:
        looked_up &= asked.valid.to(device)
    return torch.where(looked_up.unsqueeze(1), queries, 0.0), looked_up


def _counts(looked_up: Tensor, abstained: Tensor, lambdas: Tensor, valid: Tensor | None) -> Tensor:
    """Retrieved.counts."""
    not_finite = ~looked_up if valid is None else looked_up ^ valid.to(looked_up.device)
    tokens = torch.stack((looked_up, abstained, not_finite)).sum(1, dtype=torch.float64)
    return torch.cat((tokens, lambdas.sum(0, keepdim=True, dtype=torch.float64)))


def _all_abstained(router_input: Tensor, valid: Tensor | None) -> Retrieved:
    """Nothing is near, or the memory does not speak: the own routing stands."""
    lambdas = torch.zeros(len(router_input), device=router_input.device)
    abstained = lambdas == 0 if valid is None else valid
    return Retrieved(lambdas, abstained, None, _counts(abstained, abstained, lambdas, valid))


def _is_empty(entries: LayerReplica) -> bool:
    """Whether there is nothing to look for; a CUDA graph could not rely on that when it is replayed."""
    return not len(entries) and entries.device.type == "cpu"


def _copied_anew() -> ServiceUnavailable:
    return ServiceUnavailable(
        "the replica is copied anew",
        code=grpc.StatusCode.UNAVAILABLE,
        reason="replica_incomplete",
        target="",
    )
