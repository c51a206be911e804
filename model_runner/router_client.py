"""The remote retriever: lookups in a sidecar's memory, and what to do when the sidecar fails."""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from knnmoe.client import NO_PAUSES_S, PAUSES_S, ExampleRef, RoutingClient, ServiceUnavailable
from knnmoe.fingerprint import ModelFingerprint
from knnmoe.v1 import routing_pb2 as pb
from knnmoe.v1.types_pb2 import DTYPE_F32, DTYPE_U8, MEMORY_KIND_LOGIT_DELTA
from torch import Tensor

from model_runner.architectures.families import Assignment
from model_runner.router_hooks import Logits
from model_runner.routing_policy import Retrieved
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
# A connection may take longer than a lookup; text that is being generated waits less long than a score.
CONNECT_TIMEOUT_S = {"fall_back": 0.5, "raise": 10.0}
# A prompt's tokens are looked up in one go, at about a millisecond each in a large memory.
TIMEOUT_S_PER_MORE_TOKEN = 0.002


class OnError(StrEnum):
    """What a lookup that fails does."""

    FALL_BACK = "fall_back"  # the model's own router stands; counted, warned about once in a while
    RAISE = "raise"  # evaluation and building: scores never mix silently


@dataclass(slots=True)
class CircuitBreaker:
    """Opens after `failures_to_open` failures in a row; then one trial after 1 s, doubling to 30 s, with jitter.

    Several in a row are an outage, where one may be a slow lookup. The jitter (a quarter up or down) keeps runners of
    one sidecar from coming back at the same moment.
    """

    failures_to_open: int = 5
    first_pause_s: float = 1.0
    longest_pause_s: float = 30.0
    clock_s: Callable[[], float] = time.monotonic
    jitter: Callable[[], float] = random.random
    _failures: int = field(default=0, init=False)
    _pause_s: float = field(default=0.0, init=False)
    _next_trial_s: float = field(default=0.0, init=False)

    def allows(self) -> bool:
        """Whether a call may be tried now."""
        return self._failures < self.failures_to_open or self.clock_s() >= self._next_trial_s

    def succeeded(self) -> None:
        """Closes the breaker."""
        self._failures, self._pause_s = 0, 0.0

    def failed(self) -> None:
        """Counts a failure; opens the breaker, for twice as long as before when a trial failed."""
        self._failures += 1
        if self._failures >= self.failures_to_open:
            self._pause_s = min(self.longest_pause_s, max(self.first_pause_s, 2 * self._pause_s))
            self._next_trial_s = self.clock_s() + self._pause_s * (0.75 + 0.5 * self.jitter())


class RouterClient:
    """Looks router inputs up in one memory of one sidecar. Not for several threads at once.

    What fails with UNAVAILABLE is tried again at most twice inside the deadline: at once when on_error is FALL_BACK,
    after a pause when it is RAISE.

    timeout_s bounds the lookup of one token; further ones add TIMEOUT_S_PER_MORE_TOKEN each, and the first lookup
    over a connection may take CONNECT_TIMEOUT_S.
    """

    def __init__(
        self,
        target: str,
        memory: str,
        fingerprint: ModelFingerprint,
        *,
        timeout_s: float = 0.05,
        on_error: OnError = OnError.FALL_BACK,
        breaker: CircuitBreaker | None = None,
    ) -> None:
        self.target, self.memory = target, memory
        self.on_error, self.timeout_s = on_error, timeout_s
        # Lookups that fell back, by layer and reason.
        self.fallbacks: Counter[tuple[int, str]] = Counter()
        self._client = RoutingClient(
            target,
            memory,
            fingerprint.message(),
            pauses_s=NO_PAUSES_S if on_error is OnError.FALL_BACK else PAUSES_S,
            connect_timeout_s=CONNECT_TIMEOUT_S[on_error.value],
        )
        self._breaker = breaker or CircuitBreaker()
        self._warned_s = float("-inf")

    def __enter__(self) -> RouterClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the stream and the connection. Closing twice is allowed."""
        self._client.close()

    def describe(self) -> pb.MemoryDescription:
        """The memory, as it was when first asked for.

        Raises ModelMismatch when it was made for another model, MemoryNotFound, ServiceUnavailable.
        """
        return self._client.describe()

    @property
    def wants_logits(self) -> bool:
        """Whether the memory blends router logits rather than assignments. Raises as describe()."""
        return self.describe().settings.kind == MEMORY_KIND_LOGIT_DELTA

    def lookup(
        self,
        layer: int,
        router_input: Tensor,
        router_logits: Tensor,
        own: Assignment,
        *,
        exclude: Sequence[ExampleRef] = (),
    ) -> Retrieved | None:
        """route(), as tensors on the host."""
        response = self.route(layer, router_input, router_logits, own, exclude=exclude)
        if response is None:
            return None
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

        neighbours stands in for the memory's K. None when the sidecar failed and on_error is FALL_BACK. A refusal
        (wrong model, bad request) always raises.
        """

        def looked_up() -> pb.RouteResponse:
            tokens = len(router_input)
            return self._client.route(
                layer,
                encode_floats(router_input),
                encode_floats(router_logits) if self.wants_logits else encode_assignment(own),
                timeout_s=self.timeout_s + TIMEOUT_S_PER_MORE_TOKEN * (tokens - 1),
                exclude=exclude,
                with_neighbours=with_neighbours,
                neighbours=neighbours,
            )

        if self.on_error is OnError.RAISE:
            return looked_up()
        if not self._breaker.allows():
            self.fallbacks[layer, "breaker_open"] += 1
            return None
        try:
            response = looked_up()
        except ServiceUnavailable as error:
            self._breaker.failed()
            self._fell_back(layer, error)
            return None
        self._breaker.succeeded()
        return response

    def _fell_back(self, layer: int, error: ServiceUnavailable) -> None:
        self.fallbacks[layer, error.cause] += 1
        now_s = time.monotonic()
        if now_s - self._warned_s >= WARN_EVERY_S:
            self._warned_s = now_s
            log.warning("routing memory unavailable, the model's own router stands: %s", error)
