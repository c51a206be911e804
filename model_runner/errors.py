"""Everything that the model runner raises on purpose.

    RunnerError
      +-- UnsupportedLibrary   transformers is of a version that the runner was not tested with
      +-- UnsupportedModel     no router that the hooks can serve; says what to do
      +-- HooksInUse           hooks are already installed on this model
      +-- HookBypassed         a forward pass went around a hooked router
      +-- BadInput             an argument or a policy's reply has the wrong shape or value
      +-- MemoryChanged        a memory was changed while tasks were scored with it

Errors of torch and transformers are mapped to these where they are first met. Calls to a sidecar raise
knnmoe.client.ServiceError.
"""

from collections.abc import Sequence


class RunnerError(Exception):
    """Base of the tree above."""


class UnsupportedLibrary(RunnerError):
    """An installed library is of a version that is not supported."""


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


class BadInput(RunnerError):
    """An argument, or a policy's reply, has the wrong shape, type or value."""


class MemoryChanged(RunnerError):
    """A memory is no longer the one that the first answers were given with."""
