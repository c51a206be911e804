"""How far two right answers may lie apart: the same sums, which another machine's kernels add up in another order."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

# Above what random signs give: 7 times what was seen of the worst family here (gemma4_text, 2.5e-5 at 9.5 in layer 5).
_SAFETY = 4.0


def rounding(
    length: int, magnitude: float = 1.0, layers: int = 1, dtype: Any = np.float32
) -> float:
    """An absolute tolerance for numbers of this magnitude.

    Args:
        length: numbers in the longest sum of a layer; its error grows with the root of that.
        magnitude: of the largest number; an error is relative to what is added up, not to what is left of it.
        layers: through which numbers passed, of which each adds its own error to those before.
        dtype: of NumPy, in which is added up.

    """
    return _SAFETY * layers * math.sqrt(length) * float(np.finfo(dtype).eps) * magnitude


def assert_same_sums(found: Any, expected: Any, *, length: int, layers: int = 1) -> None:
    """Arrays or tensors of one dtype agree up to rounding()."""
    got, wanted = (np.asarray(each) for each in (found, expected))
    assert got.dtype == wanted.dtype
    magnitude = float(np.abs(wanted).max(initial=0.0))
    tolerance = rounding(length, magnitude, layers, wanted.dtype)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance, strict=True)
