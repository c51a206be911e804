"""Whether an entry says what its neighbours from other examples say. Pure functions."""

from __future__ import annotations

import numpy as np

from router_service.arrays import F32, Neighbours
from router_service.retention.plan import Agreement
from router_service.retention.reading import LayerReading, kernel_average
from router_service.retention.tables import F64


def leave_one_out_agreement(
    values: F32, neighbours: Neighbours, reading: LayerReading, policy: Agreement
) -> F64:
    """Agreement [T] of value rows [T, W] with the kernel average of their neighbours [T, K]; inf: not judged."""
    similarities = reading.similarities(neighbours.distances)
    average = kernel_average(reading.dense(neighbours.values), similarities)
    agreement = reading.agreement(reading.dense(values), average)
    nearest = similarities[:, 0]
    judged = (nearest > 0) & (nearest >= policy.min_similarity)
    return np.where(judged, agreement, np.inf)
