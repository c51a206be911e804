"""Settings of a memory, chosen on dev and reported on test: K, similarity, steps, their length, layers, lambda0, s0."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from model_runner.experiments.arms import fitted_memory, preset_setting
from model_runner.experiments.local import (
    LocalMemory,
    Similarity,
    collect,
    gammas_at,
    values_of,
)
from model_runner.experiments.registry import Experiment
from model_runner.experiments.results import Row, change
from model_runner.experiments.study import Study, draw
from model_runner.memory_builder.recipes import Norm
from model_runner.memory_builder.traces import GradientSettings
from model_runner.router_hooks import Policy
from model_runner.scoring import Scores

# A nat of harm to general text weighs as much as ten of gain: what chose the presets (docs/experiments.md).
HARM_WEIGHT = 10.0
BOTH = ("paper", "recommended")


def changes(study: Study, policy: Policy, split: str, what: str = "memory") -> Row:
    """Columns `domain` and `general`: the paired changes on a split, dev or test."""
    texts = {
        "domain": getattr(study.texts, split),
        "general": getattr(study.texts, f"general_{split}"),
    }
    found: Row = {"split": split}
    for name, windows in texts.items():
        scores: Scores = study.score(windows, policy, f"{what} on {name}")
        found[name] = change(scores, study.plain(windows), study.seed)
    return found


def worth(row: Row) -> float:
    """Gain less HARM_WEIGHT times the harm: what is chosen by on dev; higher is better."""
    return float(-row["domain"]["delta"] - HARM_WEIGHT * max(0.0, row["general"]["delta"]))


def swept(study: Study, settings: Iterable[tuple[Row, LocalMemory]]) -> Iterator[Row]:
    """A row per setting on dev; then the test rows of the best of each `method`, marked `chosen`."""
    best: dict[str, tuple[float, Row, LocalMemory]] = {}
    for names, memory in settings:
        row = {**names, **changes(study, memory, "dev", _what(names))}
        yield row
        method, value = str(names.get("method", "")), worth(row)
        if method not in best or value > best[method][0]:
            best[method] = (value, names, memory)
    for _, names, memory in best.values():
        yield {**names, **changes(study, memory, "test", _what(names)), "chosen": True}


def _what(names: Row) -> str:
    return " ".join(str(value) for value in names.values())


def neighbours_rows(study: Study, _part: str) -> Iterator[Row]:
    """K x similarity."""

    def settings() -> Iterator[tuple[Row, LocalMemory]]:
        counts = {"paper": (1, 3, 8, 32), "recommended": (1, 4, 16, 32, 64)}
        for method in BOTH:
            for similarity, k in itertools.product(Similarity, counts[method]):
                setting = replace(
                    preset_setting(method), neighbours=k, similarity=Similarity(similarity)
                )
                names = {"method": method, "similarity": str(similarity), "neighbours": k}
                yield names, fitted_memory(study, setting)

    yield from swept(study, settings())


def steps_rows(study: Study, _part: str) -> Iterator[Row]:
    """S gradient steps of a third, a tenth ... of the step, and S whole ones, for assignments and logits."""

    def settings() -> Iterator[tuple[Row, LocalMemory]]:
        for steps, whole in ((1, True), (3, True), (3, False), (10, True), (10, False)):
            first = preset_setting("paper").recipe
            size = first.step_size / (1 if whole else steps)
            # The path of both readings is the same: only what is stored of its end differs.
            traces = study.traces()
            if steps > 1:
                path, gradient = replace(first, step_size=size), GradientSettings(steps=steps)
                texts = (study.loaded, study.texts.reference, study.progress)
                traces = collect(*texts, gradient, recipe=path)
            for method in ("paper", "paper-v2"):
                setting = preset_setting(method)
                values = values_of(traces, replace(setting.recipe, step_size=size))
                gammas = gammas_at(study.medians(), setting.lambda0)
                names = {"method": method, "steps": steps, "eta": size}
                yield names, LocalMemory(traces.keys, values, gammas, setting)

    yield from swept(study, settings())


def step_size_rows(study: Study, _part: str) -> Iterator[Row]:
    """Length of the step and its normalisation."""

    def settings() -> Iterator[tuple[Row, LocalMemory]]:
        sizes: dict[Norm, tuple[float, ...]] = {
            Norm.RAW: (1.0, 2.0, 4.0, 8.0),
            Norm.UNIT: (0.5, 1.0, 2.0, 4.0),
            Norm.SOFT: (0.5, 1.0, 2.0, 4.0),
        }
        for method in ("paper", "paper-v2"):
            for norm, etas in sizes.items():
                for eta in etas:
                    setting = preset_setting(method)
                    recipe = replace(setting.recipe, norm=norm, step_size=eta)
                    names = {"method": method, "norm": str(norm), "eta": eta}
                    yield names, fitted_memory(study, replace(setting, recipe=recipe))
        for norm, etas in {
            Norm.RAW: (4.5, 9.0, 18.0),
            Norm.UNIT: (2.25, 4.5),
            Norm.SOFT: (1.125, 2.25, 3.375, 4.5, 9.0),
        }.items():
            for eta in etas:
                setting = preset_setting("recommended")
                recipe = replace(setting.recipe, norm=norm)
                names = {"method": "recommended", "norm": str(norm), "eta": eta}
                yield names, fitted_memory(study, replace(setting, recipe=recipe, step_size=eta))

    yield from swept(study, settings())


def layers_rows(study: Study, _part: str) -> Iterator[Row]:
    """Subsets of layers: each alone, the last quarter and half, all but one, and the best k by their gain alone."""
    layers = range(study.loaded.fingerprint.num_layers)
    for method in BOTH:
        alone: dict[int, float] = {}
        subsets: dict[str, Sequence[int]] = {f"only {layer}": (layer,) for layer in layers}
        subsets["last quarter"] = layers[-max(1, len(layers) // 4) :]
        subsets["last half"] = layers[-max(1, len(layers) // 2) :]
        subsets["first half"] = layers[: max(1, len(layers) // 2)]
        subsets |= {f"all but {layer}": [n for n in layers if n != layer] for layer in layers}
        for name, subset in subsets.items():
            row = _of_layers(study, method, name, subset, "dev")
            if len(subset) == 1:
                alone[subset[0]] = row["domain"]["delta"]
            yield row
        best = sorted(layers, key=lambda layer: alone[layer])
        for k in range(1, len(layers) + 1):
            yield _of_layers(study, method, f"best {k}", sorted(best[:k]), "test")


def _of_layers(study: Study, method: str, name: str, subset: Sequence[int], split: str) -> Row:
    memory = fitted_memory(study, replace(preset_setting(method), layers=tuple(subset)))
    names = {"method": method, "subset": name, "layers": list(subset)}
    return {**names, **changes(study, memory, split, f"{method} {name}")}


def lambda0_rows(study: Study, _part: str) -> Iterator[Row]:
    """Gain against harm: lambda0 of each kind, s0 of logit deltas."""

    def settings() -> Iterator[tuple[Row, LocalMemory]]:
        grid = {
            "paper": (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99),
            "paper-v2": (0.5, 0.8, 0.9, 0.95),
            "recommended": (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9),
        }
        for method, lambdas in grid.items():
            for lambda0 in lambdas:
                setting = replace(preset_setting(method), lambda0=lambda0)
                names = {"method": method, "lambda0": lambda0, "null_weight": setting.null_weight}
                yield names, fitted_memory(study, setting)
        for null_weight in (0.125, 1.0, 2.0, 4.0):
            setting = replace(preset_setting("recommended"), null_weight=null_weight)
            names = {"method": "recommended", "lambda0": 0.3, "null_weight": null_weight}
            yield names, fitted_memory(study, setting)

    yield from swept(study, settings())


def size_rows(study: Study, _part: str) -> Iterator[Row]:
    """Windows of the reference, doubled from 20 to all that the split has; nested draws."""
    largest = study.sizes.largest
    texts = study.texts
    drawn = draw(
        study.loaded,
        texts.domain,
        "reference",
        seed=study.seed,
        count=largest,
        data=study.data,
        length=study.sizes.length,
    )
    traces = collect(study.loaded, drawn, study.progress)
    # Windows of one length keep the order of the draw, so that the first n are a smaller draw.
    for windows in sizes_to(len(drawn)):
        rows = int((traces.window_of < windows).sum())
        keys = [k[:rows] for k in traces.keys]
        medians = study.medians_to(keys)
        norms = traces.norms(torch.arange(rows))
        for method in BOTH:
            setting = preset_setting(method)
            values = [v[:rows] for v in values_of(traces, setting.recipe, norms)]
            memory = LocalMemory(keys, values, gammas_at(medians, setting.lambda0), setting)
            names = {"method": method, "reference": windows, "entries": rows}
            yield {**names, **changes(study, memory, "test", f"{method} of {windows}")}


def sizes_to(most: int) -> list[int]:
    """20, 60, 120, 240, then doubled; the last is `most`."""
    found, size = [20, 60, 120], 240
    while size < most:
        found.append(size)
        size *= 2
    return [*(n for n in found if n < most), most]


EXPERIMENTS = (
    Experiment(
        "size",
        "How much does a memory gain with the size of its reference, from 20 windows to the full set?",
        size_rows,
    ),
    Experiment(
        "neighbours",
        "How many neighbours, and which similarity? (The paper: K = 1, RBF above cosine.)",
        neighbours_rows,
    ),
    Experiment(
        "steps", "Do more gradient steps than one gain anything? (The paper: no.)", steps_rows
    ),
    Experiment(
        "step-size",
        "How long a step, and normalised how? Does a larger step gain more?",
        step_size_rows,
    ),
    Experiment("layers", "Which layers carry the gain?", layers_rows),
    Experiment(
        "lambda0",
        "What does each nat of gain cost on general text, by lambda0 and s0?",
        lambda0_rows,
    ),
)
