"""The remote retriever: lookups in a sidecar's memory, and what to do when the sidecar fails."""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from knnmoe.client import (
    NO_PAUSES_S,
    PAUSES_S,
    Credentials,
    ExampleRef,
    MemoryNotFound,
    RoutingClient,
    ServiceError,
    ServiceUnavailable,
    blends_logits,
)
from knnmoe.fingerprint import ModelFingerprint
from knnmoe.v1 import routing_pb2 as pb
from knnmoe.v1.types_pb2 import DTYPE_F32, DTYPE_U8
from torch import Tensor

from model_runner.architectures.families import Assignment
from model_runner.errors import BadInput
from model_runner.router_hooks import Logits
from model_runner.routing_policy import FellBack, Lookups, Retrieved
from model_runner.wire import (
    decode_assignment,
    decode_floats,
    decode_tensor,
    encode_assignment,
    encode_floats,
)

log = logging.getLogger(__name__)

# An outage is a line now and then, not one per layer and token.
WARN_EVERY_S = 30.0
# A connection may take longer than a lookup; who generates text waits less long for it than who scores.
CONNECT_TIMEOUT_S = {"fall_back": 0.5, "raise": 10.0}
# A prompt's tokens are looked up in one go, at about a millisecond each in a large memory.
TIMEOUT_S_PER_MORE_TOKEN = 0.002
# The one place where the runner cuts a lookup: tokens beyond this many bytes of router inputs and logits go in another
# request. A quarter of channels.MAX_MESSAGE_BYTES: the rest is for examples to exclude, the own assignment and a reply
# as large as the request, and for a service whose limit is set lower.
MAX_REQUEST_BYTES = 16 * 1024 * 1024
# Tokens whose neighbours, with where they are from, go in one answer: 32 each, of 300 bytes, are 2.5 MB.
TOKENS_WITH_NEIGHBOURS = 256


class OnError(StrEnum):
    """What a lookup that fails does. OnError("raise") is OnError.RAISE; another name raises ValueError."""

    FALL_BACK = "fall_back"  # the model's own router stands; counted, warned about once in a while
    RAISE = "raise"  # evaluation and building: scores never mix silently

    @classmethod
    def _missing_(cls, value: object) -> OnError:
        raise ValueError(
            f"on_error: got {value!r}, expected {' or '.join(map(repr, map(str, cls)))}"
        )


@dataclass(slots=True)
class CircuitBreaker:
    """Opens after `failures_to_open` failures in a row; then one trial after 1 s, doubling to 30 s, with jitter.

    Several in a row are an outage, where one may be a slow lookup. The jitter (a quarter up or down) keeps runners of
    one sidecar from coming back at the same moment. Threads may share a breaker: one of them makes the trial.
    """

    failures_to_open: int = 5
    first_pause_s: float = 1.0
    longest_pause_s: float = 30.0
    clock_s: Callable[[], float] = time.monotonic
    jitter: Callable[[], float] = random.random
    _failures: int = field(default=0, init=False)
    _pause_s: float = field(default=0.0, init=False)
    _next_trial_s: float = field(default=0.0, init=False)
    _trying: bool = field(default=False, init=False)
    _lock: threading.Lock = field(
        default_factory=threading.Lock, init=False, repr=False, compare=False
    )

    def allows(self) -> bool:
        """Whether a call may be tried now. If that is the trial, the next one is due a pause later at the earliest."""
        with self._lock:
            if self._failures < self.failures_to_open:
                return True
            now_s = self.clock_s()
            if now_s < self._next_trial_s:
                return False
            self._trying, self._next_trial_s = True, now_s + self._pause_s
            return True

    def succeeded(self) -> None:
        """Closes the breaker."""
        with self._lock:
            self._failures, self._pause_s, self._trying = 0, 0.0, False

    def failed(self) -> None:
        """Counts a failure; opens the breaker, for twice as long as before when a trial failed."""
        with self._lock:
            self._failures += 1
            # Calls that were on their way when it opened say nothing new.
            if self._failures == self.failures_to_open or self._trying:
                self._pause_s = min(
                    self.longest_pause_s, max(self.first_pause_s, 2 * self._pause_s)
                )
                pause_s = self._pause_s * (0.75 + 0.5 * self.jitter())
                self._next_trial_s, self._trying = self.clock_s() + pause_s, False


class RouterClient:
    """Looks router inputs up in one memory of one sidecar. Threads may share it; close it when they have ended.

    What fails with UNAVAILABLE is tried again at most twice inside the deadline: at once when on_error is FALL_BACK,
    after a pause when it is RAISE.

    timeout_s bounds the lookup of one token, the first one too, whatever it has to wait for; further tokens add
    TIMEOUT_S_PER_MORE_TOKEN each. describe() waits for a connection up to CONNECT_TIMEOUT_S: call it first.

    on_error: an OnError, or its name: "fall_back", "raise". Raises ValueError for another.
    credentials: those of the environment when not given. Raises BadCredentials.
    """

    def __init__(
        self,
        target: str,
        memory: str,
        fingerprint: ModelFingerprint,
        *,
        timeout_s: float = 0.05,
        on_error: OnError | str = OnError.FALL_BACK,
        breaker: CircuitBreaker | None = None,
        credentials: Credentials | None = None,
    ) -> None:
        self.target, self.memory = target, memory
        self.on_error, self.timeout_s = OnError(on_error), timeout_s
        self._client = RoutingClient(
            target,
            memory,
            fingerprint.message(),
            pauses_s=NO_PAUSES_S if self.on_error is OnError.FALL_BACK else PAUSES_S,
            connect_timeout_s=CONNECT_TIMEOUT_S[self.on_error.value],
            credentials=credentials,
        )
        self._breaker = breaker or CircuitBreaker()
        # Of what follows.
        self._lock = threading.Lock()
        self._lookups = 0
        self._fallbacks: Counter[tuple[int, str]] = Counter()
        self._was_found = False
        self._warned_s = float("-inf")

    def __enter__(self) -> RouterClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection; lookups on their way in other threads raise ClientClosed. Closing twice is allowed."""
        self._client.close()

    @property
    def fallbacks(self) -> Counter[tuple[int, str]]:
        """Lookups that fell back so far, by layer and reason."""
        with self._lock:
            return self._fallbacks.copy()

    @property
    def lookups(self) -> Lookups:
        """Lookups so far, and those that fell back by reason."""
        with self._lock:
            fell_back = Counter[str]()
            for (_, reason), number in self._fallbacks.items():
                fell_back[reason] += number
            return Lookups(self._lookups, fell_back)

    def describe(self) -> pb.MemoryDescription:
        """The memory, as it was when first asked for.

        Raises ModelMismatch when it was made for another model, MemoryNotFound, ServiceUnavailable.
        """
        return self._described(None)

    @property
    def wants_logits(self) -> bool:
        """Whether the memory blends router logits rather than assignments. Raises as describe()."""
        return _wants_logits(self.describe())

    def lookup(
        self,
        layer: int,
        router_input: Tensor,
        router_logits: Tensor,
        own: Assignment,
        *,
        valid: Tensor | None = None,
        exclude: Sequence[ExampleRef] = (),
        note: Callable[[pb.RouteResponse], None] | None = None,
    ) -> Retrieved | FellBack:
        """See Retriever. Padding is not sent; what does not go in one message goes in several.

        A lookup of which one part fails falls back; so does one that is not finite somewhere, without being sent.
        note: gets each answer, with the neighbours, in the order of the tokens that are not padding.
        """
        self._count_lookup()
        rows = _rows_to_ask(valid)
        asked = _Asked(router_input, router_logits, own).take(rows)
        if not (_are_finite(asked.inputs) and _are_finite(asked.logits)):
            return self._fell_back(layer, "not_finite")
        refs = _per_token(exclude, len(router_input), rows)
        answers: list[Retrieved] = []
        most = tokens_per_request(router_input, router_logits)
        most = most if note is None else min(most, TOKENS_WITH_NEIGHBOURS)
        for start in range(0, len(asked.inputs), most):
            part = slice(start, start + most)
            found = self._ask(layer, asked.take(part), refs[part], note)
            if isinstance(found, FellBack):
                return found
            answers.append(found)
        return _joined(answers, _Asked(router_input, router_logits, own), rows)

    def _ask(
        self,
        layer: int,
        asked: _Asked,
        exclude: Sequence[ExampleRef],
        note: Callable[[pb.RouteResponse], None] | None,
    ) -> Retrieved | FellBack:
        """One message, as tensors on the host."""
        options = {"exclude": exclude, "with_neighbours": note is not None}
        response = self._routed(layer, asked.inputs, asked.logits, asked.own, options)
        if isinstance(response, FellBack):
            return response
        if note is not None:
            note(response)
        blended: Assignment | Logits | None = None
        if response.HasField("router_logits"):
            blended = Logits(decode_floats(response.router_logits))
        elif response.HasField("assignment"):
            blended = decode_assignment(response.assignment)
        return Retrieved(
            decode_tensor(response.lambdas, DTYPE_F32),
            decode_tensor(response.abstained, DTYPE_U8) != 0,
            blended,
        )

    def route(
        self,
        layer: int,
        router_input: Tensor,
        router_logits: Tensor,
        own: Assignment,
        *,
        exclude: Sequence[ExampleRef] = (),
        with_neighbours: bool = False,
        neighbours: int | None = None,
    ) -> pb.RouteResponse | None:
        """Looks up T tokens: router_input [T, d], logits [T, N], own assignment [T, k].

        neighbours stands in for the memory's K. None when the sidecar failed, or the memory is no longer there, and
        on_error is FALL_BACK. A refusal (wrong model, bad request, a memory that never was there) always raises.
        """
        options = {
            "exclude": exclude,
            "with_neighbours": with_neighbours,
            "neighbours": neighbours,
        }
        self._count_lookup()
        response = self._routed(layer, router_input, router_logits, own, options)
        return None if isinstance(response, FellBack) else response

    def nearest_similarities(
        self,
        layer: int,
        router_input: Tensor,
        router_logits: Tensor,
        own: Assignment,
        exclude: Sequence[ExampleRef],
    ) -> Tensor:
        """f32 [T] on the host: that of the nearest key of another example than the token's in `exclude` [T]; or 0.

        Needs on_error RAISE: what fell back is near to nothing and far from nothing. Raises BadInput, ServiceError.
        """
        asked, found = _Asked(router_input, router_logits, own), [torch.empty(0)]
        most = tokens_per_request(router_input, router_logits)
        for start in range(0, len(router_input), most):
            tokens = slice(start, start + most)
            part = asked.take(tokens)
            response = self.route(
                *(layer, part.inputs, part.logits, part.own),
                exclude=exclude[tokens],
                with_neighbours=True,
                neighbours=1,
            )
            if response is None:
                raise BadInput(
                    "nearest_similarities needs a client that raises when the sidecar fails"
                )
            found.append(decode_tensor(response.neighbours.similarities, DTYPE_F32)[:, 0])
        return torch.cat(found)

    def _routed(
        self,
        layer: int,
        router_input: Tensor,
        router_logits: Tensor,
        own: Assignment,
        options: Mapping[str, Any],
    ) -> pb.RouteResponse | FellBack:
        def looked_up() -> pb.RouteResponse:
            timeout_s = self.timeout_s + TIMEOUT_S_PER_MORE_TOKEN * (len(router_input) - 1)
            started_s = time.monotonic()
            described = self._described(timeout_s)
            timeout_s -= time.monotonic() - started_s
            return self._client.route(
                layer,
                encode_floats(router_input),
                encode_floats(router_logits)
                if _wants_logits(described)
                else encode_assignment(own),
                timeout_s=timeout_s,
                **options,
            )

        if self.on_error is OnError.RAISE:
            return looked_up()
        if not self._breaker.allows():
            return self._fell_back(layer, "breaker_open")
        try:
            response = looked_up()
        except (ServiceUnavailable, MemoryNotFound) as error:
            if isinstance(error, MemoryNotFound) and not self._was_found:
                raise  # a mistaken name is not an outage
            self._breaker.failed()
            return self._fell_back(layer, error.cause, error)
        self._breaker.succeeded()
        return response

    def _count_lookup(self) -> None:
        self._client.require_usable()  # before any lock: in a forked process it may be held for ever
        with self._lock:
            self._lookups += 1

    def _described(self, timeout_s: float | None) -> pb.MemoryDescription:
        found = self._client.describe(timeout_s)
        self._was_found = True
        return found

    def _fell_back(self, layer: int, reason: str, error: ServiceError | None = None) -> FellBack:
        now_s = time.monotonic()
        with self._lock:
            self._fallbacks[layer, reason] += 1
            warn = error is not None and now_s - self._warned_s >= WARN_EVERY_S
            if warn:
                self._warned_s = now_s
        if warn:
            log.warning("routing memory unavailable, the model's own router stands: %s", error)
        return FellBack(reason)


def _are_finite(floats: Tensor) -> bool:
    """Looked at one by one only where their sum is not finite, which it may be of large numbers too."""
    return math.isfinite(floats.sum(dtype=torch.float32)) or bool(torch.isfinite(floats).all())


def _wants_logits(described: pb.MemoryDescription) -> bool:
    return blends_logits(described.settings.kind)


@dataclass(frozen=True, slots=True)
class _Asked:
    """Tokens of one layer: inputs [T, d], logits [T, N], their own assignment [T, k]."""

    inputs: Tensor
    logits: Tensor
    own: Assignment

    def take(self, rows: Tensor | slice | None) -> _Asked:
        """Those of `rows`; None: all of them, without a copy."""
        if rows is None:
            return self
        own = Assignment(self.own.weights[rows], self.own.experts[rows])
        return _Asked(self.inputs[rows], self.logits[rows], own)


def _rows_to_ask(valid: Tensor | None) -> Tensor | None:
    """Row numbers int64 [n] that are not padding; None: all."""
    return None if valid is None or bool(valid.all()) else valid.nonzero().flatten()


def _per_token(
    exclude: Sequence[ExampleRef], tokens: int, rows: Tensor | None
) -> Sequence[ExampleRef]:
    """The example of each row's sequence; none when none is left out."""
    if not exclude:
        return ()
    each = tokens // len(exclude)
    return [exclude[row // each] for row in (range(tokens) if rows is None else rows.tolist())]


def tokens_per_request(router_input: Tensor, router_logits: Tensor) -> int:
    """Tokens [T, d] and logits [T, N] that go in one request: as many as MAX_REQUEST_BYTES hold, one at least."""
    token_bytes = sum(t.shape[1] * t.element_size() for t in (router_input, router_logits))
    return max(1, MAX_REQUEST_BYTES // token_bytes)


def _joined(answers: Sequence[Retrieved], asked: _Asked, rows: Tensor | None) -> Retrieved:
    """One answer for all tokens of `asked`, from those for parts of `rows`: the rest keeps its own routing."""
    if rows is None and len(answers) == 1:
        (found,) = answers
        return found
    tokens = len(asked.inputs)
    every = torch.arange(tokens) if rows is None else rows.cpu()
    lambdas = torch.zeros(tokens)
    abstained = torch.zeros(tokens, dtype=torch.bool)
    blended: Assignment | Logits | None = None
    start = 0
    for found in answers:
        part = every[start : start + len(found.lambdas)]
        start += len(part)
        lambdas[part], abstained[part] = found.lambdas, found.abstained
        blended = _merged(blended, asked, found.blended, part)
    counts = [len(every), int(abstained.sum()), 0, float(lambdas.sum(dtype=torch.float64))]
    return Retrieved(lambdas, abstained, blended, torch.tensor(counts, dtype=torch.float64))


def _merged(
    before: Assignment | Logits | None,
    asked: _Asked,
    blended: Assignment | Logits | None,
    rows: Tensor,
) -> Assignment | Logits | None:
    """`before`, or the own routing where there is none, with `blended` in `rows`."""
    if blended is None:
        return before
    if isinstance(blended, Logits):
        own = before.router_logits if isinstance(before, Logits) else asked.logits
        return Logits(_with_rows(own, blended.router_logits, rows))
    own_routing = before if isinstance(before, Assignment) else asked.own
    width = blended.experts.shape[1]
    return Assignment(
        _with_rows(_widened(own_routing.weights, width), blended.weights, rows),
        _with_rows(_widened(own_routing.experts, width), blended.experts, rows),
    )


def _widened(own: Tensor, width: int) -> Tensor:
    """Own columns [T, k] padded to `width` with zeros: expert 0 at weight 0."""
    return torch.nn.functional.pad(own, (0, max(0, width - own.shape[1])))


def _with_rows(own: Tensor, blended: Tensor, rows: Tensor) -> Tensor:
    """`own` with `rows` replaced; on the device of `own`."""
    merged = own.clone()
    merged[rows.to(own.device)] = blended.to(own)
    return merged
