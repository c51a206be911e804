"""`model-runner build`: a memory of reference text.

Imports of torch and gRPC stand inside functions: --help does not wait for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from model_runner.cli import options
from model_runner.cli.calibrate import calibrated, router_inputs
from model_runner.errors import BadInput
from model_runner.progress import Progress

if TYPE_CHECKING:
    from knnmoe.client import AdminClient
    from knnmoe.v1.memory_admin_pb2 import CalibrateResponse, LayerCalibration
    from knnmoe.v1.types_pb2 import Tensor

    from model_runner.memory_builder.boosting import Outcome
    from model_runner.memory_builder.builder import MemoryBuilder
    from model_runner.memory_builder.null_entries import PresetStep
    from model_runner.memory_builder.recipes import Preset
    from model_runner.models import LoadedModel
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
            help="Similarity at the median distance. Default: the preset's (0.9 paper, 0.3 recommended, 0.5 boosted).",
            callback=options.fraction,
        ),
    ] = None,
    general: Annotated[
        Path | None,
        options.file_option(
            "Text that the memory is not for, of any kind: it keeps silent where it would change the routing of such "
            "text most. Logit deltas only. Default: general English text that ships with this package."
        ),
    ] = None,
    general_windows: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Look at so many windows of --general, drawn evenly; 0: none. Default: eight tokens for each entry, "
            "or all that there are.",
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

    Beside them there are as many entries again that change nothing, of general text where the memory would change its
    routing most: a source of its own, `general:FILE`, a set for each such file. They are chosen anew when the memory
    has grown, or with --general-windows; meanwhile it takes the shorter steps of a memory without them. Lookups made to
    choose them count as uses of entries. For example:

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
    from model_runner.memory_builder.null_entries import PresetStep
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
            found = general_text(of_general, loaded.tokenizer, length, progress)
            others = _beside(every, found, of_general, progress)
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
        gone = 0
        if replace_source:
            gone = forget_other_texts(client, memory, every)
            progress.say(f"{gone} entries of other text of {every[0].ref.source} were deleted")
        index = partial(_index, client, progress) if optimize else _leave
        own = PRESETS.get(client.describe(memory).settings.preset, chosen)  # of when it was made
        at = lambda0 or own.lambda0
        of_text = partial(router_inputs, loaded, held_out or [], batch_size, progress)
        inputs = None if held_out is None else cache(of_text)
        finished = _Finish(client, memory, progress, at, inputs, index)
        if others:
            changed = bool(report.entries_per_layer or gone or general_windows is not None)
            step = PresetStep(client, memory, own, loaded.fingerprint.num_layers)
            _silence(finished, step, builder, loaded, others, general_windows, anew=changed)
        finished.calibrate(boosts=bool(most))
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
    from model_runner.texts import distinct

    known = {window.token_ids for window in reference}
    others = [window for window in general if window.token_ids not in known]
    if not others:
        raise BadInput(
            f"--general {path}: all of it is in the reference; give text that the memory is not for, or "
            "--general-windows 0"
        )
    if same := len(general) - len(others):
        progress.say(f"{same} windows of {path.name} are in the reference, and are left out")
    return distinct(others)


def _silence(
    finished: _Finish,
    step: PresetStep,
    builder: MemoryBuilder,
    loaded: LoadedModel,
    general: Sequence[Window],
    most_windows: int | None,
    *,
    anew: bool,
) -> None:
    """Null entries, as many as the memory has others, and the step that goes with them.

    anew: also where they are complete. Until they are, the memory has the step of one without.
    """
    from model_runner.memory_builder import null_entries
    from model_runner.retrieval import open_retriever
    from model_runner.router_client import OnError
    from model_runner.routing_policy import RetrievalPolicy
    from model_runner.texts import drawn

    client, memory, progress = finished.client, finished.memory, finished.progress
    source, num_layers = general[0].ref.source, loaded.fingerprint.num_layers
    there = null_entries.present(client, memory, source)
    few = null_entries.windows_to_look_at(there.others, general)
    looked_at = drawn(general, few if most_windows is None else most_windows)
    if not anew and there.is_complete(looked_at, num_layers):
        progress.say(f"{memory}: {there.others} entries per layer of {source} were there already")
    else:
        step.shorten()
        if there.entries:  # else they would be heard, too, where the memory speaks
            null_entries.forget(client, memory, source)
        finished.bandwidths()
        where = (client.target, memory, loaded.fingerprint, loaded.device, None, progress)
        with open_retriever(
            *where, timeout_s=options.LOOKUP_TIMEOUT_S, on_error=OnError.RAISE
        ) as opened:
            moved = builder.changes(looked_at, RetrievalPolicy(opened.retriever), progress)
        added = builder.add_null_entries(memory, looked_at, moved, there.others, progress)
        progress.say(
            f"{memory}: wrote {added} entries per layer of {source}, near which it keeps silent"
        )
    tokens = sum(window.targets for window in looked_at)
    enough = null_entries.ENOUGH * there.others
    if tokens >= enough:
        step.lengthen()
    elif step.is_short:
        progress.say(
            f"{memory}: keeps the shorter step of a memory without general text, of which {tokens} tokens were looked "
            f"at, expected {enough}; give more with --general"
        )


def _rounds_of(preset: Preset, given: int | None) -> int:
    """Boosting rounds at most. Raises BadInput for values that have none."""
    from model_runner.memory_builder.recipes import Kind

    most = preset.rounds if given is None else given
    if most and preset.recipe.kind is not Kind.LOGIT_DELTA:
        raise BadInput(
            f"--rounds {most}: preset {preset.name} stores no logit deltas, which rounds boost; --preset boosted"
        )
    return most


_KEEPS_BANDWIDTHS = " anew: it was boosted with the bandwidths that it has"


@dataclass(frozen=True, slots=True)
class _Finish:
    """What becomes of a memory whose entries are written.

    Attributes:
        lambda0: of calibration.
        inputs: gives the router inputs of held-out text; None: there is none.
        index: gets a memory's name.

    """

    client: AdminClient
    memory: str
    progress: Progress
    lambda0: float
    inputs: Callable[[], dict[int, Tensor]] | None
    index: Callable[..., None]

    def calibrate(self, *, boosts: bool) -> None:
        """Indexes it, unless another one is to take its place, and sets its bandwidths."""
        from knnmoe.v1.types_pb2 import SIMILARITY_COSINE

        settings = self.client.describe(self.memory).settings
        if settings.rounds or not boosts:
            self.index(self.memory)
        response = self.bandwidths()
        if response is None:
            cosine = settings.similarity == SIMILARITY_COSINE
            why = ": a cosine memory has no bandwidth" if cosine else _KEEPS_BANDWIDTHS
            self.progress.say(f"not calibrated{why}")
            return
        gammas = " ".join(f"{layer.gamma:.3g}" for layer in response.layers)
        self.progress.say(f"calibrated, gamma per layer: {gammas}")
        _say_copies(self.progress, self.memory, response.layers)

    def bandwidths(self) -> CalibrateResponse | None:
        """Sets them; None: it has none, or keeps those that it was boosted with."""
        from knnmoe.v1.types_pb2 import SIMILARITY_COSINE

        settings = self.client.describe(self.memory).settings
        if settings.similarity == SIMILARITY_COSINE or settings.rounds:
            return None
        inputs = None if self.inputs is None else self.inputs()
        return calibrated(self.client, self.memory, self.lambda0, inputs, self.progress)

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
