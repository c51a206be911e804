"""Windows of random tokens of the tiny models."""

from __future__ import annotations

import torch
from knnmoe.client import ExampleRef

from model_runner.texts import Window
from tests.families import VOCABULARY


def windows_of(*lengths: int) -> list[Window]:
    """A window of each length, of an example of its own, all of whose tokens but the first have a loss."""
    generator = torch.Generator().manual_seed(1)
    return [
        Window(
            ExampleRef("s", str(number)),
            tuple(torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()),
            tuple(range(1, length)),
            0,
        )
        for number, length in enumerate(lengths)
    ]
