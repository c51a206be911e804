"""`model-runner build` and `calibrate`: from options to calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

from knnmoe.client import AdminClient
from knnmoe.v1 import memory_admin_pb2 as pb
from knnmoe.v1.types_pb2 import SIMILARITY_COSINE

from model_runner.errors import BadInput
from model_runner.memory_builder.builder import GradientSettings, MemoryBuilder, Target
from model_runner.memory_builder.recipes import Norm, Recipe
from model_runner.models import LoadedModel, load_model, window_length
from model_runner.presets import PRESETS, Preset
from model_runner.progress import Progress
from model_runner.router_inputs import collect_router_inputs
from model_runner.texts import Window, read_windows
from model_runner.wire import encode_by_layer


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """Options of `model-runner build`, as given."""

    reference: Path
    memory: str
    model: str
    target: str
    preset: str
    window: int | None
    max_windows: int | None
    batch_size: int
    step_size: float | None
    norm: str | None
    steps: int
    scope: str
    own_token: bool
    straight_through: bool
    calibrate_on: Path | None
    lambda0: float | None
    gain: bool
    optimize: bool
    device: str
    dtype: str


def run_build(options: BuildOptions, progress: Progress) -> None:
    """Creates the memory (or finds it), fills, calibrates and indexes it."""
    preset = PRESETS[options.preset]
    recipe = _recipe(preset, options)
    with AdminClient(options.target) as client:
        # A sidecar that is not there is noticed before the model is loaded, bad text before the long work.
        is_new = client.find(options.memory) is None
        loaded = load_model(options.model, device=options.device, dtype=options.dtype)
        length = window_length(loaded.model, options.window)
        windows = read_windows(options.reference, loaded.tokenizer, length)[: options.max_windows]
        held_out = _held_out(loaded, options.calibrate_on, length)
        if is_new and held_out is None:
            _require_two_examples(windows, options.reference)
        client.find_or_create(
            options.memory,
            loaded.fingerprint.message(),
            preset.settings(loaded.fingerprint.num_layers),
        )
        builder = MemoryBuilder(
            loaded.model,
            loaded.fingerprint,
            client,
            _gradient(options),
            batch_size=options.batch_size,
        )
        report = builder.build(
            windows,
            [Target(options.memory, recipe, measure_gain=options.gain)],
            progress,
        )
        progress.say(
            f"{options.memory}: wrote {report.entries_per_layer} entries per layer in {report.elapsed_s:.0f} s; "
            f"{report.windows_skipped} of {report.windows} windows were there already"
        )
        _finish(client, loaded, held_out, options, preset, progress)


def _finish(
    client: AdminClient,
    loaded: LoadedModel,
    held_out: Sequence[Window] | None,
    options: BuildOptions,
    preset: Preset,
    progress: Progress,
) -> None:
    if options.optimize:
        progress.say("indexing")
        client.optimize(options.memory)
    if client.describe(options.memory).settings.similarity == SIMILARITY_COSINE:
        progress.say("not calibrated: a cosine memory has no bandwidth")
        return
    inputs = None
    if held_out is not None:
        found = collect_router_inputs(loaded.model, held_out, batch_size=options.batch_size)
        inputs = encode_by_layer(found)
    lambda0 = preset.lambda0 if options.lambda0 is None else options.lambda0
    response = client.calibrate(options.memory, lambda0, inputs)
    gammas = " ".join(f"{layer.gamma:.3g}" for layer in response.layers)
    progress.say(f"calibrated, gamma per layer: {gammas}")


def _held_out(loaded: LoadedModel, text: Path | None, length: int) -> list[Window] | None:
    return None if text is None else read_windows(text, loaded.tokenizer, length)


def _require_two_examples(windows: Sequence[Window], reference: Path) -> None:
    """Calibration inside the memory leaves a token's own example out: something must remain."""
    if len({window.ref for window in windows}) < 2:
        raise BadInput(
            f"{reference}: one example only, so its bandwidths cannot be calibrated by leaving examples out; "
            "give --calibrate-on FILE, or more text"
        )


def _recipe(preset: Preset, options: BuildOptions) -> Recipe:
    recipe = preset.recipe
    if options.norm is not None:
        recipe = replace(recipe, norm=Norm(options.norm))
    if options.step_size is not None:
        recipe = replace(recipe, step_size=options.step_size)
    return recipe


def _gradient(options: BuildOptions) -> GradientSettings:
    return GradientSettings(
        steps=options.steps,
        scope=cast("Literal['leaf', 'live']", options.scope),
        straight_through=options.straight_through,
        own_token=options.own_token,
    )


def run_calibrate(
    memory: str,
    text: Path | None,
    model: str,
    target: str,
    lambda0: float,
    quantile: float,
    window: int | None,
    batch_size: int,
    dry_run: bool,
    device: str,
    dtype: str,
) -> pb.CalibrateResponse:
    """Calibrates on the router inputs of a text, or (None) inside the memory."""
    with AdminClient(target) as client:
        client.describe(memory)
        inputs = None
        if text is not None:
            loaded = load_model(model, device=device, dtype=dtype)
            length = window_length(loaded.model, window)
            windows = read_windows(text, loaded.tokenizer, length)
            found = collect_router_inputs(loaded.model, windows, batch_size=batch_size)
            inputs = encode_by_layer(found)
        return client.calibrate(memory, lambda0, inputs, quantile=quantile, dry_run=dry_run)
