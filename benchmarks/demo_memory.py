"""A memory of the shipped model in a real sidecar, built and scored as `model-runner demo` does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from knnmoe.client import AdminClient

from model_runner.memory_builder.builder import MemoryBuilder, Target, collect_router_inputs
from model_runner.memory_builder.recipes import PRESETS, Preset
from model_runner.models import LoadedModel
from model_runner.progress import Progress
from model_runner.router_client import OnError, RouterClient
from model_runner.routing_policy import RetrievalPolicy
from model_runner.scoring import Scores, score
from model_runner.sidecar import running_sidecar
from model_runner.texts import Window
from model_runner.wire import encode_by_layer

RECOMMENDED = "recommended"
BATCH_SIZE = 32
LOOKUP_TIMEOUT_S = 60.0

Inputs = dict[int, torch.Tensor]  # router inputs [n, d] by layer


@dataclass(frozen=True, slots=True)
class Bench:
    """The shipped model beside one sidecar."""

    loaded: LoadedModel
    target: str
    progress: Progress
    preset: Preset

    def build(self, memory: str, reference: Sequence[Window], index: str) -> None:
        """Fills a memory with reference windows and indexes it; `index`: the compression of the search keys."""
        model = self.loaded.fingerprint
        with AdminClient(self.target) as client:
            client.find_or_create(memory, model.message(), self.preset.settings(model.num_layers))
            builder = MemoryBuilder(self.loaded.model, model, client, batch_size=BATCH_SIZE)
            builder.build(reference, [Target(memory, self.preset.recipe)], self.progress)
            client.optimize(memory, index)

    def inputs(self, windows: Sequence[Window], most: int) -> Inputs:
        """At most `most` router inputs per layer."""
        return collect_router_inputs(self.loaded.model, windows, most=most)

    def calibrate(self, memory: str, inputs: Inputs) -> None:
        """Sets gamma of every layer by the preset's lambda0."""
        with AdminClient(self.target) as client:
            client.calibrate(memory, self.preset.lambda0, encode_by_layer(inputs))

    def plain(self, windows: Sequence[Window]) -> Scores:
        """Scores of the model alone."""
        return self._score(windows, None)

    def routed(self, memory: str, windows: Sequence[Window]) -> Scores:
        """Scores with a memory; raises RunnerError when the sidecar fails."""
        model = self.loaded.fingerprint
        with RouterClient(
            self.target, memory, model, timeout_s=LOOKUP_TIMEOUT_S, on_error=OnError.RAISE
        ) as client:
            return self._score(windows, RetrievalPolicy(client))

    def _score(self, windows: Sequence[Window], policy: RetrievalPolicy | None) -> Scores:
        quiet = Progress(quiet=True)
        return score(self.loaded.model, windows, policy, quiet, what="", batch_size=BATCH_SIZE)


@contextmanager
def running_bench(
    loaded: LoadedModel, progress: Progress, preset: str = RECOMMENDED
) -> Iterator[Bench]:
    """A bench whose sidecar and data are gone afterwards."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory()))
        target = stack.enter_context(running_sidecar(directory / "data", directory / "log"))
        yield Bench(loaded, target, progress, PRESETS[preset])
