"""Memories of experiments, in RAM, route as the sidecar's do."""

from __future__ import annotations

import numpy as np
import pytest
from knnmoe.client import AdminClient

from model_runner.experiments.arms import preset_setting
from model_runner.experiments.local import LocalMemory, collect, values_of
from model_runner.memory_builder.builder import collect_router_inputs
from model_runner.routing_policy import RetrievalPolicy
from model_runner.scoring import score
from model_runner.wire import encode_by_layer
from tests.integration.runner_parts import (
    BATCH_SIZE,
    PRESET_NAMES,
    QUIET,
    SENTENCES,
    build,
    client_of,
    loaded_model,
    scored,
    windows_of,
)
from tests.sidecar import Sidecar

# Windows of 23 targets, whose losses are of 4 nats each: f32 distances, summed in another order.
TOLERANCE = 2e-4


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_scores_equal_those_through_the_sidecar(
    ram_sidecar: Sidecar, name: str, preset: str
) -> None:
    loaded, setting = loaded_model(), preset_setting(preset)
    reference = windows_of(SENTENCES[:5])
    build(ram_sidecar.target, name, preset, windows=reference)
    with AdminClient(ram_sidecar.target) as admin:
        held_out = collect_router_inputs(loaded.model, windows_of(SENTENCES[5:]))
        admin.calibrate(name, setting.lambda0, encode_by_layer(held_out))
        gammas = list(admin.describe(name).settings.gamma)
    with client_of(ram_sidecar.target, name) as client:
        remote = scored(RetrievalPolicy(client))

    traces = collect(loaded, reference, QUIET, batch_size=BATCH_SIZE)
    memory = LocalMemory(traces.keys, values_of(traces, setting.recipe), gammas, setting)
    how = {"what": "", "batch_size": BATCH_SIZE}
    local = score(loaded.model, windows_of(), memory, QUIET, **how).nll_sums

    np.testing.assert_allclose(local, remote, rtol=TOLERANCE)
    assert np.abs(local - scored(None)).max() > 100 * TOLERANCE
