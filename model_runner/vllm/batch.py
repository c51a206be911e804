"""Which tokens of a forward pass read which memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True)
class RequestUse:
    """What one request's lookups came to: one at each MoE layer, in each forward pass that it is part of.

    Attributes:
        memory: what it reads.
        request: its id, as its client knows it.
        fell_back: lookups, by reason.

    """

    memory: str
    request: str
    lookups: int = 0
    fell_back: Counter[str] = field(default_factory=Counter)

    def count(self, reason: str | None) -> None:
        """Counts one lookup; reason: why it fell back."""
        self.lookups += 1
        if reason is not None:
            self.fell_back[reason] += 1


@dataclass(frozen=True, slots=True)
class Group:
    """The tokens of a forward pass that read one memory.

    Attributes:
        rows: of the tokens; a slice where they lie side by side, else int64 [n] on the device.
        uses: of their requests.

    """

    memory: str
    rows: slice | Tensor
    uses: tuple[RequestUse, ...]


def grouped(
    uses: Sequence[RequestUse | None], starts: Sequence[int], device: torch.device
) -> list[Group]:
    """Groups by memory. Request i has the tokens starts[i] up to starts[i + 1]; its use is None where it runs plain."""
    of_memory: dict[str, list[int]] = {}
    for number, use in enumerate(uses):
        if use is not None:
            of_memory.setdefault(use.memory, []).append(number)
    return [
        Group(memory, _rows(numbers, starts, device), tuple(u for i in numbers if (u := uses[i])))
        for memory, numbers in of_memory.items()
    ]


def _rows(numbers: Sequence[int], starts: Sequence[int], device: torch.device) -> slice | Tensor:
    first, last = numbers[0], numbers[-1]
    if last - first + 1 == len(numbers):
        return slice(starts[first], starts[last + 1])
    return torch.cat([torch.arange(starts[i], starts[i + 1]) for i in numbers]).to(device)
