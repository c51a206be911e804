"""A study: one model, one domain, one draw of windows, and what several experiments need of it, made once."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from model_runner.errors import BadInput
from model_runner.experiments.local import Traces, collect, distances_to
from model_runner.memory_builder.builder import collect_router_inputs
from model_runner.memory_builder.null_entries import LOOKED_AT
from model_runner.memory_builder.traces import GradientSettings
from model_runner.models import LoadedModel
from model_runner.progress import Progress
from model_runner.router_hooks import Policy
from model_runner.scoring import Scores, score
from model_runner.small_moe import DATA_DIR
from model_runner.texts import Window, read_windows

SHIPPED_DOMAIN = "bible"
# Of the shipped texts, whose files are named otherwise.
_SHIPPED = {SHIPPED_DOMAIN: "shifted"}
GENERAL = "general"

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many windows, of `length` tokens.

    Attributes:
        largest: of the experiment on the size of the reference; None: all that there are.
        questions: of the multiple choice.
        prompts: of the texts that are generated.

    """

    length: int = 128
    reference: int = 240
    dev: int = 32
    test: int = 64
    general_dev: int = 32
    general_test: int = 64
    largest: int | None = None
    questions: int = 1800
    prompts: int = 32
    batch_size: int = 32


QUICK = Sizes(
    reference=48,
    dev=8,
    test=16,
    general_dev=8,
    general_test=16,
    largest=96,
    questions=96,
    prompts=8,
    batch_size=16,
)


@dataclass(frozen=True, slots=True)
class StudyTexts:
    """Windows of one domain and of general text, drawn by the study's seed; no split shares a document with another.

    Attributes:
        reference: what memories are made of and baselines are trained on.
        general_reference: what null entries are chosen from: near them memories keep silent. LOOKED_AT windows for each
            of the reference, where there are so many.
        dev, general_dev: settings are chosen on these.
        test, general_test: reported.

    """

    domain: str
    reference: list[Window]
    dev: list[Window]
    test: list[Window]
    general_dev: list[Window]
    general_test: list[Window]
    general_reference: list[Window]


@dataclass(frozen=True, slots=True)
class Study:
    """One model, one domain, one draw. What costs time is made once and kept: traces, scores of the plain model.

    Attributes:
        data: directory of the domains' files; None: what ships.

    """

    loaded: LoadedModel
    texts: StudyTexts
    seed: int
    progress: Progress
    sizes: Sizes = field(default_factory=Sizes)
    data: Path | None = None
    _kept: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)
    _made_s: dict[Hashable, float] = field(default_factory=dict, repr=False, compare=False)

    @property
    def model(self) -> str:
        """Short name of the model: its directory's."""
        return model_name(self.loaded.name)

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` gave the first time."""
        if key not in self._kept:
            started = time.perf_counter()
            self._kept[key] = make()
            self._made_s[key] = time.perf_counter() - started
        made: Made = self._kept[key]
        return made

    def made_s(self, *keys: Hashable) -> float:
        """Seconds that it took to make these, by their keys."""
        return sum(self._made_s[key] for key in keys)

    def traces(self) -> Traces:
        """Of the reference, with the builder's default gradient."""
        return self.once(
            "traces", lambda: collect(self.loaded, self.texts.reference, self.progress)
        )

    def general_inputs(self) -> list[Tensor]:
        """Router inputs [m, d] per layer of the reference split of general text: keys that null entries may have."""
        return self.once("general inputs", self._general_inputs)

    def _general_inputs(self) -> list[Tensor]:
        windows = self.texts.general_reference
        found = collect_router_inputs(
            self.loaded.model,
            windows,
            batch_size=self.sizes.batch_size,
            most=sum(window.targets for window in windows),
        )
        return [found[layer].float().to(self.loaded.device) for layer in sorted(found)]

    def traces_with(self, gradient: GradientSettings) -> Traces:
        """Of the reference, with another gradient; not kept."""
        return collect(self.loaded, self.texts.reference, self.progress, gradient)

    def medians(self) -> list[float]:
        """Median squared distance, per layer, of dev router inputs to the nearest key of the reference."""
        return self.once("medians", lambda: self.medians_to(self.traces().keys))

    def medians_to(self, keys: Sequence[Tensor]) -> list[float]:
        """Of dev router inputs to other keys, per layer [n, d]."""
        inputs = self.once(
            "dev inputs",
            lambda: collect_router_inputs(self.loaded.model, self.texts.dev, most=1000),
        )
        return distances_to(inputs, keys)

    def score(self, windows: Sequence[Window], policy: Policy | None, what: str) -> Scores:
        """Of windows, longest first; pair them only with scores of the same windows."""
        size = self.sizes.batch_size
        return score(self.loaded.model, windows, policy, self.progress, what=what, batch_size=size)

    def plain(self, windows: Sequence[Window]) -> Scores:
        """Of the model as it is."""
        key = ("plain", tuple((w.ref, w.offset, w.token_ids, w.target_at) for w in windows))
        return self.once(key, lambda: self.score(windows, None, "plain model"))


def model_name(name: str) -> str:
    """The last part of a path or hub name; `model`, the directory of the shipped one, is `small_moe`."""
    path = Path(name)
    return path.parent.name if path.name == "model" else path.name


def open_study(
    loaded: LoadedModel,
    domain: str,
    seed: int,
    progress: Progress,
    *,
    data: Path | None = None,
    sizes: Sizes | None = None,
) -> Study:
    """Draws the windows. Raises BadInput when a file is missing, or holds too few windows to say anything."""
    sizes = sizes or Sizes()
    drawn = partial(draw, loaded, seed=seed, data=data, length=sizes.length)
    texts = StudyTexts(
        domain,
        drawn(domain, "reference", count=sizes.reference),
        drawn(domain, "dev", count=sizes.dev),
        drawn(domain, "test", count=sizes.test),
        drawn(GENERAL, "dev", count=sizes.general_dev),
        drawn(GENERAL, "test", count=sizes.general_test),
        drawn(GENERAL, "reference", count=LOOKED_AT * sizes.reference),
    )
    return Study(loaded, texts, seed, progress, sizes, data)


def draw(
    loaded: LoadedModel,
    domain: str,
    split: str,
    *,
    seed: int,
    count: int | None,
    data: Path | None = None,
    length: int = 128,
) -> list[Window]:
    """`count` full windows of a split, without replacement, by the seed; None: all."""
    path = text_file(domain, split, data)
    full = [w for w in read_windows(path, loaded.tokenizer, length) if len(w.token_ids) == length]
    if len(full) < 2:
        raise BadInput(f"{path}: {len(full)} windows of {length} tokens, expected at least 2")
    most = len(full) if count is None else min(count, len(full))
    return random.Random(f"{seed}/{domain}/{split}").sample(full, most)


def text_file(domain: str, split: str, data: Path | None) -> Path:
    """DIR/<domain>_<split>.jsonl; without a directory, of what ships. Raises BadInput when it is not there."""
    if data is None:
        path = DATA_DIR / f"{_SHIPPED.get(domain, domain)}_{split}.jsonl"
    else:
        path = data / f"{domain}_{split}.jsonl"
    if not path.is_file():
        raise BadInput(f"{path} is not there; domains here: {', '.join(domains(data))}")
    return path


def domains(data: Path | None) -> list[str]:
    """Those with a reference, in the order of the alphabet; general text is none of them."""
    if data is None:
        return list(_SHIPPED)
    found = sorted(
        path.name.removesuffix("_reference.jsonl") for path in data.glob("*_reference.jsonl")
    )
    return [name for name in found if name != GENERAL]
