"""Studies of tiny random models: windows of random tokens.

from tests.unit.model_runner.experiments.studies import tiny_study
"""

from __future__ import annotations

import random

from knnmoe.client import ExampleRef

from model_runner.experiments.study import Sizes, Study, StudyTexts
from model_runner.fingerprint import model_fingerprint
from model_runner.models import LoadedModel
from model_runner.progress import Progress
from model_runner.texts import Window
from tests.families import VOCABULARY, tiny_model

LENGTH = 12
SIZES = Sizes(LENGTH, 6, 3, 3, 3, 3, batch_size=4)


def windows_of(name: str, count: int, length: int = LENGTH) -> list[Window]:
    """Documents of two windows each; the last window is shorter."""
    draw = random.Random(name)
    found = []
    for number in range(count):
        size = length - 3 if number == count - 1 else length
        ids = tuple(draw.randrange(3, VOCABULARY) for _ in range(size))
        ref = ExampleRef(name, str(number // 2))
        found.append(Window(ref, ids, tuple(range(1, size)), length * (number % 2)))
    return found


def tiny_study(family: str = "olmoe") -> Study:
    """Of a fresh model without a tokenizer."""
    model = tiny_model(family).requires_grad_(False)
    loaded = LoadedModel(f"tiny/{family}", model, None, model_fingerprint(model))
    texts = StudyTexts(
        "random",
        reference=windows_of("reference", SIZES.reference),
        dev=windows_of("dev", SIZES.dev),
        test=windows_of("test", SIZES.test),
        general_dev=windows_of("general dev", SIZES.general_dev),
        general_test=windows_of("general test", SIZES.general_test),
        general_reference=windows_of("general reference", SIZES.reference),
    )
    return Study(loaded, texts, 0, Progress(quiet=True), SIZES)
