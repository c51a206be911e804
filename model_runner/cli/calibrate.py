"""`model-runner calibrate`: a memory's bandwidths, and how it is read when it must not harm.

Imports of torch and gRPC stand inside functions: --help does not wait for them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from model_runner.cli import options
from model_runner.errors import BadInput
from model_runner.progress import Progress

if TYPE_CHECKING:
    from knnmoe.client import AdminClient
    from knnmoe.v1.memory_admin_pb2 import CalibrateResponse
    from knnmoe.v1.operations_pb2 import Operation
    from knnmoe.v1.types_pb2 import MemorySettings, Tensor

    from model_runner.evaluation.harm_control import Trial
    from model_runner.models import LoadedModel
    from model_runner.retrieval import Retrieval
    from model_runner.texts import Window


def calibrate(
    memory: options.Memory,
    text: Annotated[
        Path | None,
        options.file_option(
            "Held-out text. Default: leave-one-example-out in the memory. With --general: what the gain is measured on."
        ),
    ] = None,
    general: Annotated[
        Path | None,
        options.file_option(
            "Text that the memory is not for, of any kind: chooses lambda0 and the null weight with the largest gain "
            "on --text among those that keep the harm here within --harm."
        ),
    ] = None,
    harm: Annotated[
        float,
        typer.Option(
            min=0,
            help="With --general: what its NLL may rise by, in nats per token, at the upper end of a 95 % interval.",
        ),
    ] = 0.005,
    model: options.Model = options.DEFAULT_MODEL,
    target: options.Target = options.DEFAULT_TARGET,
    lambda0: Annotated[
        float,
        typer.Option(
            help="Similarity at the quantile of the distance; with --general it is chosen.",
            callback=options.fraction,
        ),
    ] = 0.5,
    quantile: Annotated[
        float, typer.Option(help="Of the distance to the nearest key.", callback=options.fraction)
    ] = 0.5,
    leave_one_out: options.LeaveOneOut = False,
    max_windows: Annotated[
        int, typer.Option(min=2, help="With --general: of each text so many windows at most.")
    ] = 64,
    replica_memory: options.ReplicaMemory = None,
    window: options.Window = None,
    batch_size: options.BatchSize = 8,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show, store nothing.")] = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
) -> None:
    """Set each layer's bandwidth gamma so that the similarity at the median nearest distance is lambda0.

    A larger lambda0 lets the memory speak more, also where nothing in it is close. With --general the largest gain
    under a bound on harm is looked for. For example:

        model-runner calibrate --memory law --text held-out.jsonl --lambda0 0.5

        model-runner calibrate --memory law --text held-out.jsonl --general news.jsonl --harm 0.005

        model-runner calibrate --memory law --text law.jsonl --leave-one-out --general news.jsonl
    """
    from knnmoe.client import AdminClient

    from model_runner.models import window_length
    from model_runner.texts import read_windows

    if general is not None and text is None:
        raise BadInput(
            "--general: the gain needs --text, held-out text of the memory's kind, or its reference and --leave-one-out"
        )
    progress = Progress()
    with AdminClient(target) as client:
        client.describe(memory)  # what is not there is noticed before the model is loaded
        inputs, loaded = None, None
        windows: list[Window] = []
        if text is not None:
            loaded = options.load(model, device, dtype)
            length = window_length(loaded.model, window)
            windows = read_windows(text, loaded.tokenizer, length)
            if not leave_one_out:
                inputs = router_inputs(loaded, windows, batch_size, progress)
        response = calibrated(
            *(client, memory, lambda0, inputs, progress),
            quantile=quantile,
            dry_run=dry_run or general is not None,
        )
        if general is None or loaded is None:
            _print_calibration(response)
            return
        control = _HarmControl(client, memory, loaded, harm, max_windows, batch_size, progress)
        chosen = control.chosen(
            [layer.squared_distance for layer in response.layers],
            read_windows(general, loaded.tokenizer, length),
            windows,
            leave_one_out,
            options.retrieval("replica", replica_memory, "f32", "auto"),
        )
        if not dry_run:
            client.update_settings(memory, chosen)


def calibrated(
    client: AdminClient,
    memory: str,
    lambda0: float,
    inputs: dict[int, Tensor] | None,
    progress: Progress,
    **more: Any,
) -> CalibrateResponse:
    """Sets the bandwidths, with progress; inputs: see AdminClient.calibrate."""
    layers = [layer.entries for layer in client.describe(memory).layers]
    with progress.counting(sum(layers), "calibrating", "entries") as done:

        def note(operation: Operation) -> None:
            if at := re.match(r"layer (\d+):", operation.stage):
                done(sum(layers[: int(at[1])]) + operation.done)

        return client.calibrate(memory, lambda0, inputs, on_progress=note, **more)


def router_inputs(
    loaded: LoadedModel, windows: Sequence[Window], batch_size: int, progress: Progress
) -> dict[int, Tensor]:
    """Router inputs of held-out text by layer, as they travel."""
    from model_runner.memory_builder.builder import collect_router_inputs
    from model_runner.wire import encode_by_layer

    return encode_by_layer(
        collect_router_inputs(loaded.model, windows, batch_size=batch_size, progress=progress)
    )


def _print_calibration(response: CalibrateResponse) -> None:
    table = Table("layer", "squared distance", "gamma", "queries", "copies")
    for layer in response.layers:
        table.add_row(
            str(layer.layer),
            f"{layer.squared_distance:.4g}",
            f"{layer.gamma:.4g}",
            str(layer.queries),
            str(layer.copies),
        )
    Console().print(table)


@dataclass(frozen=True, slots=True)
class _HarmControl:
    """Chooses how a memory is read, in a replica beside the model."""

    client: AdminClient
    memory: str
    loaded: LoadedModel
    harm: float
    max_windows: int
    batch_size: int
    progress: Progress

    def chosen(
        self,
        squared_distances: Sequence[float],
        general: Sequence[Window],
        text: Sequence[Window],
        leave_one_out: bool,
        how: Retrieval,
    ) -> MemorySettings:
        """The settings with the largest gain; says what each does. Raises BadInput when all harm too much."""
        from model_runner.evaluation.harm_control import Measured, least_harm
        from model_runner.memory_builder.entries import known_text
        from model_runner.replica.held import HeldMemory
        from model_runner.replica.retriever import ReplicaRetriever
        from model_runner.retrieval import open_retriever
        from model_runner.router_client import OnError
        from model_runner.texts import drawn

        loaded, fingerprint = self.loaded, self.loaded.fingerprint
        few = drawn(text, self.max_windows)
        if leave_one_out:  # under the names that the memory knows them by
            few = known_text(self.client, self.memory, few).windows
        where = (self.client.target, self.memory, fingerprint, loaded.device, how, self.progress)
        with open_retriever(*where, on_error=OnError.RAISE) as opened, opened.paused():
            assert isinstance(opened.retriever, ReplicaRetriever)  # noqa: S101
            copy = opened.retriever.copy
            held = HeldMemory(copy.layers, copy.settings, copy.examples, copy.lock)
            measured = Measured(
                *(loaded.model, held, fingerprint.num_experts, squared_distances),
                *(drawn(general, self.max_windows), few, leave_one_out),
                *(self.progress, self.batch_size),
            )
            trials = least_harm(measured, self.harm)
        _print_trials(trials)
        return trials[0].reading.settings(squared_distances)


def _print_trials(trials: Sequence[Trial]) -> None:
    """The first is the one that is taken."""
    table = Table("", "lambda0", "null weight", "text", "general text", "at most (95 %)")
    for trial in trials:
        null, gain = trial.reading.null_weight, trial.gain
        table.add_row(
            "chosen" if trial is trials[0] else "",
            f"{trial.reading.lambda0:g}",
            "" if null is None else f"{null:g}",
            "" if gain is None else f"{gain.delta:+.4f} ± {gain.se:.4f}",
            f"{trial.harm.delta:+.4f} ± {trial.harm.se:.4f}",
            f"{trial.most_harm:+.4f}",
        )
    Console().print(table)
