"""`model-runner build` and `calibrate`: a memory of reference text, and its bandwidths.

Imports of torch and gRPC stand inside functions: --help does not wait for them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from model_runner.cli import options
from model_runner.errors import BadInput
from model_runner.progress import Progress

if TYPE_CHECKING:
    from knnmoe.client import AdminClient
    from knnmoe.v1.memory_admin_pb2 import CalibrateResponse, LayerCalibration
    from knnmoe.v1.operations_pb2 import Operation
    from knnmoe.v1.types_pb2 import MemorySettings, Tensor

    from model_runner.evaluation.harm_control import Trial
    from model_runner.memory_builder.boosting import Outcome
    from model_runner.memory_builder.recipes import Preset
    from model_runner.models import LoadedModel
    from model_runner.retrieval import Retrieval
    from model_runner.texts import Window

# Whether a gradient passes later routers.
Scope = Literal["leaf", "live"]


def build(
    reference: Annotated[Path, options.file_option(f"Text to remember: {options.TEXT_FILE}")],
    memory: options.Memory,
    model: options.Model = options.DEFAULT_MODEL,
    target: options.Target = options.DEFAULT_TARGET,
    preset: Annotated[
        options.Preset,
        typer.Option(
            help="recommended: logit deltas, K = 32. boosted: the same, after boosting rounds: more gain, more time to "
            "build. paper: assignments, K = 1. paper-v2: the same step, stored and blended as logits, so that as many "
            "experts run as without a memory."
        ),
    ] = "recommended",
    rounds: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Boosting rounds at most, of logit deltas: each goes over the text with the memory on, leaving out a "
            "token's own example, and steps on from there, until the NLL hardly falls. Default: the preset's (boosted: "
            "6, others: none).",
        ),
    ] = None,
    window: options.Window = None,
    max_windows: Annotated[
        int | None, typer.Option(min=1, help=f"Remember {options.DRAWN}")
    ] = None,
    batch_size: options.BatchSize = 8,
    step_size: Annotated[
        float | None,
        typer.Option(
            min=0, help="eta of the stored step; the preset's by default (paper, paper-v2: 2)."
        ),
    ] = None,
    norm: Annotated[
        options.Norm | None,
        typer.Option(help="Length of a step: raw (paper, paper-v2), unit, or soft (recommended)."),
    ] = None,
    steps: Annotated[
        int,
        typer.Option(
            min=1, help="Gradient steps S; more than 1 gains little. Not for logit deltas."
        ),
    ] = 1,
    gradient_scope: Annotated[
        Scope, typer.Option(help="leaf: later routers held fixed. live: gradient passes them.")
    ] = "leaf",
    own_token: Annotated[
        bool,
        typer.Option(help="Use (nearly) each token's own loss only, not its effect on later ones."),
    ] = False,
    straight_through: Annotated[
        bool, typer.Option(help="Give experts that were not chosen a gradient too.")
    ] = False,
    calibrate_on: Annotated[
        Path | None,
        options.file_option(
            "Held-out text for the bandwidths. Default: leave-one-example-out in the memory."
        ),
    ] = None,
    lambda0: Annotated[
        float | None,
        typer.Option(
            help="Similarity at the median distance; the preset's by default (0.9 paper and paper-v2, 0.3 ours).",
            callback=options.fraction,
        ),
    ] = None,
    general: Annotated[
        Path | None,
        options.file_option(
            "Text that the memory is not for, of any kind: near it the memory keeps silent, which halves what it "
            "harms elsewhere. Logit deltas only. Default: general English text that ships with this package."
        ),
    ] = None,
    general_windows: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="So many windows of --general at most, drawn evenly; 0: none. Default: as many as are remembered.",
        ),
    ] = None,
    gain: Annotated[
        bool,
        typer.Option("--gain/--no-gain", help="Measure what each entry saves (one more pass)."),
    ] = True,
    snippets: options.Snippets = True,
    replace_source: options.ReplaceSource = False,
    optimize: Annotated[
        bool, typer.Option("--optimize/--no-optimize", help="Index the keys when they are written.")
    ] = True,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quiet: options.Quiet = False,
) -> None:
    """Build a memory from reference text, or go on with a build that was cut off.

    Running it again with the same text skips what is there, boosting rounds too; for other settings delete the memory
    first or choose another name. Entries know their text: another file of the same name is added, and text of an `id`
    that the memory holds with other text is refused unless the new file takes the old one's place. While it is boosted
    a memory serves as it is; its rounds are memories NAME.round-K, of which one takes its place.

    General text is stored beside it, as many entries again that change nothing: a source of its own, `general:FILE`.
    For example:

        model-runner build --memory law --reference law.jsonl --calibrate-on held-out.jsonl

        model-runner build --memory law --reference law.jsonl --general news.jsonl

        model-runner build --memory law --reference law.jsonl --preset boosted

        model-runner build --memory law --reference law.jsonl --replace-source
    """
    from knnmoe.client import AdminClient

    from model_runner.memory_builder.boosting import require_two_examples
    from model_runner.memory_builder.builder import MemoryBuilder, Target
    from model_runner.memory_builder.entries import (
        forget_other_texts,
        general_text,
        windows_as_known,
    )
    from model_runner.memory_builder.recipes import PRESETS
    from model_runner.memory_builder.traces import GradientSettings
    from model_runner.models import window_length
    from model_runner.texts import drawn, read_windows

    progress, chosen = Progress(quiet=quiet), PRESETS[preset]
    entries = Target(memory, chosen.recipe.altered(norm, step_size), measure_gain=gain)
    most, of_general = _rounds_of(chosen, rounds), _general_of(chosen, general, general_windows)
    gradient = GradientSettings(steps, gradient_scope, straight_through, own_token)
    with AdminClient(target) as client:
        # A sidecar that is not there is noticed before the model is loaded, bad text before the long work.
        is_new = client.find(memory) is None
        loaded = options.load(model, device, dtype)
        length = window_length(loaded.model, window)
        every = read_windows(reference, loaded.tokenizer, length, progress)
        windows, held_out = drawn(every, max_windows), None
        if calibrate_on is not None:
            held_out = read_windows(calibrate_on, loaded.tokenizer, length, progress)
        elif is_new:
            _require_two_examples(windows, every, reference)
        if most:
            require_two_examples(windows)
        others: list[Window] = []
        if of_general is not None:
            few = len(windows) if general_windows is None else general_windows
            found = general_text(of_general, loaded.tokenizer, length, progress)
            others = drawn(_beside(every, found, of_general, progress), few)
        settings = chosen.settings(loaded.fingerprint.num_layers)
        client.find_or_create(memory, loaded.fingerprint.message(), settings)
        if not replace_source:
            windows = windows_as_known(client, memory, windows)
        builder = MemoryBuilder(
            *(loaded.model, loaded.fingerprint, client, gradient),
            batch_size=batch_size,
            tokenizer=loaded.tokenizer if snippets else None,
        )
        report = builder.build(windows, [entries], progress)
        progress.say(
            f"{memory}: wrote {report.entries_per_layer} entries per layer in {report.elapsed_s:.0f} s; "
            f"{report.windows_skipped} of {report.windows} windows were there already"
        )
        if repeated := len(windows) - report.windows:
            progress.say(f"{repeated} windows repeat others of the file and were written once")
        if replace_source:
            gone = forget_other_texts(client, memory, every)
            progress.say(f"{gone} entries of other text of {every[0].ref.source} were deleted")
        if others:
            added = builder.add_null_entries(memory, others, progress)
            progress.say(
                f"{memory}: wrote {added.entries_per_layer} entries per layer of {others[0].ref.source}, near which it "
                f"keeps silent; {added.windows_skipped} of {added.windows} windows were there already"
            )
        index = partial(_index, client, progress) if optimize else _leave
        finished = _Finish(client, memory, progress, index)
        inputs = None if held_out is None else partial(_inputs, loaded, held_out, batch_size)
        finished.calibrate(lambda0 or chosen.lambda0, inputs, boosts=bool(most))
        if most:
            finished.boost(
                partial(builder.boost, memory, windows, most, progress, recipe=entries.recipe)
            )


def _general_of(preset: Preset, text: Path | None, windows: int | None) -> Path | None:
    """The general text that null entries are made of; None: there are none. Raises BadInput."""
    from model_runner.memory_builder.recipes import Kind
    from model_runner.small_moe import data_file

    if preset.recipe.kind is not Kind.LOGIT_DELTA:
        if text is None and not windows:
            return None
        raise BadInput(
            f"--general: preset {preset.name} stores routings and no changes of them, of which none can be stored; "
            "--preset recommended, or leave it out"
        )
    return None if windows == 0 else text or data_file("general", "reference")


def _beside(
    reference: Sequence[Window], general: Sequence[Window], path: Path, progress: Progress
) -> list[Window]:
    """Windows of general text that are not in the reference, which would be silenced. Raises BadInput: all are."""
    known = {window.token_ids for window in reference}
    others = [window for window in general if window.token_ids not in known]
    if not others:
        raise BadInput(
            f"--general {path}: all of it is in the reference; give text that the memory is not for, or "
            "--general-windows 0"
        )
    if same := len(general) - len(others):
        progress.say(f"{same} windows of {path.name} are in the reference, and are left out")
    return others


def _rounds_of(preset: Preset, given: int | None) -> int:
    """Boosting rounds at most. Raises BadInput for values that have none."""
    from model_runner.memory_builder.recipes import Kind

    most = preset.rounds if given is None else given
    if most and preset.recipe.kind is not Kind.LOGIT_DELTA:
        raise BadInput(
            f"--rounds {most}: preset {preset.name} stores no logit deltas, which rounds boost; --preset boosted"
        )
    return most


@dataclass(frozen=True, slots=True)
class _Finish:
    """What becomes of a memory whose entries are written; `index` gets a memory's name."""

    client: AdminClient
    memory: str
    progress: Progress
    index: Callable[..., None]

    def calibrate(
        self,
        lambda0: float,
        inputs: Callable[[Progress], dict[int, Tensor]] | None,
        *,
        boosts: bool,
    ) -> None:
        """Indexes it, unless another one is to take its place, and sets its bandwidths."""
        from knnmoe.v1.types_pb2 import SIMILARITY_COSINE

        settings = self.client.describe(self.memory).settings
        if settings.rounds or not boosts:
            self.index(self.memory)
        if settings.similarity == SIMILARITY_COSINE:
            self.progress.say("not calibrated: a cosine memory has no bandwidth")
            return
        if settings.rounds:
            self.progress.say("not calibrated anew: it was boosted with the bandwidths that it has")
            return
        of_text = None if inputs is None else inputs(self.progress)
        response = _calibrated(self.client, self.memory, lambda0, of_text, self.progress)
        gammas = " ".join(f"{layer.gamma:.3g}" for layer in response.layers)
        self.progress.say(f"calibrated, gamma per layer: {gammas}")
        _say_copies(self.progress, self.memory, response.layers)

    def boost(self, run: Callable[..., Outcome]) -> None:
        """Boosts it; what takes its place is indexed before."""
        kept = self.client.describe(self.memory).layers[0].quantization
        compressed = "" if kept == "none" else kept
        outcome = run(finish=partial(self.index, quantization=compressed))
        self.progress.say(f"{self.memory}: {outcome}")
        if not outcome.rounds:  # nothing took its place
            self.index(self.memory)


def _index(client: AdminClient, progress: Progress, memory: str, quantization: str = "") -> None:
    numbers = progress.track(client.describe(memory).layers, "indexing", "layers")
    layers = client.optimizing(memory, quantization)
    found = [layer for _, layer in zip(numbers, layers, strict=True)]
    if exact := [layer.entries for layer in found if not layer.indexed_entries]:
        progress.say(f"searched exactly: {max(exact)} entries a layer need no index")


def _leave(memory: str, quantization: str = "") -> None:
    """Of --no-optimize."""


def _require_two_examples(
    windows: Sequence[Window], every: Sequence[Window], reference: Path
) -> None:
    """Calibration inside the memory leaves a token's own example out: something must remain."""
    kept, there = (len({window.ref for window in some}) for some in (windows, every))
    if kept > 1:
        return
    if there > 1:
        found = f"--max-windows {len(windows)} leaves one of its {there} examples"
        remedy = "give --calibrate-on FILE, or --max-windows 2 or more"
    else:
        found, remedy = "one example only", "give --calibrate-on FILE, or more text"
    raise BadInput(
        f"{reference}: {found}, so its bandwidths cannot be calibrated by leaving examples out; {remedy}"
    )


def _say_copies(progress: Progress, memory: str, layers: Sequence[LayerCalibration]) -> None:
    most = [layer for layer in layers if 2 * layer.copies > layer.queries]
    if most:
        progress.say(
            f"most tokens' nearest entry is a copy of them in {len(most)} of {len(layers)} layers (text made from a "
            "template, or there twice); copies counted as the token's own example. What removing them would change: "
            f"router-admin prune {memory} --near-duplicates 0.98 --dry-run"
        )


def _calibrated(
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


def _inputs(
    loaded: LoadedModel, windows: Sequence[Window], batch_size: int, progress: Progress
) -> dict[int, Tensor]:
    """Router inputs of held-out text by layer, as they travel."""
    from model_runner.memory_builder.builder import collect_router_inputs
    from model_runner.wire import encode_by_layer

    return encode_by_layer(
        collect_router_inputs(loaded.model, windows, batch_size=batch_size, progress=progress)
    )


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
                inputs = _inputs(loaded, windows, batch_size, progress)
        response = _calibrated(
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
