"""What cannot be served is refused at the start, naming both sides and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from knnmoe.client import MemoryNotFound, ModelMismatch, ServiceUnavailable
from knnmoe.v1.types_pb2 import SUPPORT_TOP_K

from model_runner.errors import BadInput, UnsupportedModel
from tests.sidecar import Sidecar
from tests.vllm.ask import engine
from tests.vllm.models import Checkpoint, fill, prompts

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")

Fill = Callable[[Sidecar, dict[str, Checkpoint]], None]
TEXTS = prompts(1)


def assignments(family: str, support: int | None) -> Fill:
    given: dict[str, Any] = {"preset": "paper"} | ({"support": support} if support else {})
    return lambda sidecar, models: fill(sidecar, "law", models[family], TEXTS, **given)


@pytest.mark.parametrize(
    ("family", "filled", "options", "error", "message"),
    [
        ("olmoe", None, {}, MemoryNotFound, "law"),
        ("olmoe", assignments("mixtral", SUPPORT_TOP_K), {}, ModelMismatch, "mixtral"),
        (
            "olmoe",
            assignments("olmoe", SUPPORT_TOP_K),
            {},
            UnsupportedModel,
            "--preset recommended",
        ),
        ("mixtral", assignments("mixtral", None), {}, UnsupportedModel, "--support top_k"),
        ("olmoe", None, {"target": "127.0.0.1:9"}, ServiceUnavailable, "127.0.0.1:9"),
        ("olmoe", None, {"memorys": ["law"]}, BadInput, "unknown memorys"),
    ],
)
def test_at_the_start(
    family: str,
    filled: Fill | None,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    checkpoint: Callable[[str], Checkpoint],
    tmp_path: Any,
) -> None:
    models = {name: checkpoint(name) for name in ("olmoe", "mixtral")}
    with Sidecar(tmp_path / "data") as sidecar:
        if filled is not None:
            filled(sidecar, models)
        config = {"target": sidecar.target, "memories": ["law"], **options}
        with pytest.raises(error, match=message), engine(models[family].path, config):
            pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enable_expert_parallel": True}, "expert parallelism"),
        ({"enable_lora": True}, "LoRA"),
    ],
)
def test_a_setting_that_was_not_tested(
    options: dict[str, Any], message: str, checkpoint: Callable[[str], Checkpoint]
) -> None:
    with (
        pytest.raises(UnsupportedModel, match=message),
        engine(checkpoint("olmoe").path, {"memory": "law"}, **options),
    ):
        pass


def test_without_configuration_the_plugin_is_silent(
    checkpoint: Callable[[str], Checkpoint],
) -> None:
    from vllm.exceptions import VLLMValidationError

    from tests.vllm.ask import ask

    with engine(checkpoint("olmoe").path, None) as llm:
        assert ask(llm, TEXTS)
        with pytest.raises(VLLMValidationError, match="serves no memory"):
            ask(llm, TEXTS, "law")
