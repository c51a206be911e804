"""What vLLM makes of a model with a memory is what transformers makes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from knnmoe.v1.types_pb2 import SUPPORT_TOP_K

from tests.sidecar import Sidecar
from tests.vllm.ask import apart, ask, engine
from tests.vllm.models import (
    FAMILIES,
    MORE_FAMILIES,
    NEW_TOKENS,
    Checkpoint,
    fill,
    prompts,
    with_memory,
    written,
)

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")
from model_runner.vllm.serving import TESTED_MODELS

# Of a log-probability in f32: sums of 128 to 512 products in another order, through three layers.
TOLERANCE = 2e-5
TEXTS = prompts(4)


# Their routing is a softmax over the k largest logits: assignments can be said in logits.
SCALED_TO_ONE = ("qwen3_moe", "mixtral", "gpt_oss")
PAPER: dict[str, Any] = {"preset": "paper", "support": SUPPORT_TOP_K}
PAPER_V2: dict[str, Any] = {"preset": "paper-v2"}


@pytest.mark.parametrize(
    ("family", "retrieval"),
    [*((family, where) for where in ("remote", "replica") for family in FAMILIES)]
    + [(family, "replica") for family in MORE_FAMILIES],
)
def test_a_memory_acts_as_in_transformers(
    family: str, retrieval: str, checkpoint: Callable[[str], Checkpoint], sidecar: Sidecar
) -> None:
    model = checkpoint(family)
    settings = {f"{family}-{retrieval}-deltas": {}, f"{family}-{retrieval}-logits": PAPER_V2}
    if family in SCALED_TO_ONE:
        settings[f"{family}-{retrieval}-paper"] = PAPER
    for name, given in settings.items():
        fill(sidecar, name, model, prompts(8, seed=1) + TEXTS[:2], **given)
    config = {
        "target": sidecar.target,
        "memories": [*settings],
        "retrieval": retrieval,
        "timeout_s": 20,
    }
    with engine(model.path, config) as llm:
        plain = ask(llm, TEXTS)
        remembered = {name: ask(llm, TEXTS, name) for name in settings}
        [status] = llm.collective_rpc("knn_moe_status")
    assert family in TESTED_MODELS
    layers = model.fingerprint.num_layers
    assert (status["hooked"], status["layers"], status["missed"]) == (layers, layers, [])
    assert apart(plain, written(model, TEXTS)) < TOLERANCE
    for name, texts in remembered.items():
        assert status["memories"][name]["where"] == retrieval
        assert status["memories"][name]["lookups"] == layers * NEW_TOKENS
        assert not status["memories"][name]["fell_back"]
        assert apart(texts, with_memory(model, sidecar.target, name, TEXTS)) < TOLERANCE
        assert apart(plain, texts) > 100 * TOLERANCE


@pytest.mark.parametrize("retrieval", ["remote", "replica"])
def test_a_compiled_model_reads_its_memory(
    retrieval: str, checkpoint: Callable[[str], Checkpoint], sidecar: Sidecar
) -> None:
    model, name = checkpoint("qwen3_moe"), f"compiled-{retrieval}"
    fill(sidecar, name, model, TEXTS[:2])
    config = {
        "target": sidecar.target,
        "memories": [name],
        "retrieval": retrieval,
        "timeout_s": 20,
    }
    with engine(model.path, config, enforce_eager=False) as llm:
        assert llm.llm_engine.vllm_config.compilation_config.mode.name != "NONE"
        plain, remembered = ask(llm, TEXTS), ask(llm, TEXTS, name)
        [status] = llm.collective_rpc("knn_moe_status")
    assert (status["hooked"], status["layers"], status["missed"]) == (3, 3, [])
    assert apart(plain, written(model, TEXTS)) < TOLERANCE
    assert apart(remembered, with_memory(model, sidecar.target, name, TEXTS)) < TOLERANCE
