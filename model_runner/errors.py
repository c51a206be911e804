"""Everything that the model runner raises on purpose.

    RunnerError
      +-- UnsupportedModel     no router that the hooks can serve; says what to do
      +-- HooksInUse           hooks are already installed on this model
      +-- HookBypassed         a forward pass went around a hooked router
      +-- ModelMismatch        the memory was built for another model
      +-- RoutingUnavailable   the sidecar is slow or gone
      +-- RoutingRefused       the sidecar said no: a reason and a message
      +-- BadInput             an argument or a policy's reply has the wrong shape or value

Errors of torch, transformers and grpc are mapped to these where they are first met.
"""

from collections.abc import Sequence

__all__ = [
    "BadInput",
    "HookBypassed",
    "HooksInUse",
    "ModelMismatch",
    "RoutingRefused",
    "RoutingUnavailable",
    "RunnerError",
    "UnsupportedModel",
]


class RunnerError(Exception):
    """Base of the tree above."""


class UnsupportedModel(RunnerError):
    """The model is not a Mixture of Experts, or its routers cannot be hooked."""


class HooksInUse(RunnerError):
    """Another `RouterHooks` is active on this model, or this one was entered twice."""


class HookBypassed(RunnerError):
    """Some routers were not called although the model ran.

    Attributes:
        names: dotted paths of the routers that were not called.

    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        super().__init__(
            f"{len(self.names)} MoE layer(s) ran without their router being called: "
            f"{', '.join(self.names)}. Fused kernels and quantized experts do this; load the model "
            "without them (gpt_oss: Mxfp4Config(dequantize=True)) and install the hooks before "
            "torch.compile."
        )


class ModelMismatch(RunnerError):
    """The memory's model fingerprint is not this model's."""


class RoutingUnavailable(RunnerError):
    """The routing sidecar did not answer in time, or cannot be reached.

    Attributes:
        reason: a word to count by: `deadline`, `unavailable`, `overloaded`, `shutting_down`, ...
        passing: the same call may succeed in a moment (gRPC's UNAVAILABLE).

    """

    def __init__(self, message: str, reason: str = "unavailable", *, passing: bool = False) -> None:
        self.reason, self.passing = reason, passing
        super().__init__(message)


class RoutingRefused(RunnerError):
    """The routing sidecar understood the request and refused it.

    Attributes:
        reason: the reason enum's name, for programs to branch on.
        message: the sidecar's words, for people.

    """

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        self.message = message
        super().__init__(f"{message} ({reason})")


class BadInput(RunnerError):
    """An argument, or a policy's reply, has the wrong shape, type or value."""
