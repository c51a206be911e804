"""What a memory is not served with is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from model_runner.errors import UnsupportedModel
from tests.vllm.models import Checkpoint

vllm = pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")


@pytest.mark.parametrize(
    ("named", "place", "value"),
    [
        ("CUDA graphs: --enforce-eager", "compilation_config.cudagraph_mode", "FULL_AND_PIECEWISE"),
        ("--enable-expert-parallel", "parallel_config.enable_expert_parallel", True),
        ("--enable-eplb", "parallel_config.enable_eplb", True),
        ("--data-parallel-size", "parallel_config.data_parallel_size", 2),
        ("--pipeline-parallel-size", "parallel_config.pipeline_parallel_size", 2),
        ("--enable-lora", "lora_config", object()),
    ],
)
def test_a_setting_that_was_not_tested_is_refused(
    named: str, place: str, value: Any, checkpoint: Callable[[str], Checkpoint]
) -> None:
    from vllm.config import CUDAGraphMode
    from vllm.engine.arg_utils import EngineArgs

    from model_runner.vllm.limits import require_served

    options = {"dtype": "float32", "skip_tokenizer_init": True, "max_model_len": 64}
    config = EngineArgs(str(checkpoint("olmoe").path), **options).create_engine_config()
    require_served(config)
    *path, last = place.split(".")
    owner = config
    for name in path:
        owner = getattr(owner, name)
    setattr(owner, last, CUDAGraphMode[value] if last == "cudagraph_mode" else value)
    with pytest.raises(UnsupportedModel, match=named):
        require_served(config)
