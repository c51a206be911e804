"""What a memory is not served with is refused by name: settings that cannot be started on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from model_runner.errors import UnsupportedModel
from tests.vllm.models import Checkpoint

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")

FULL = "FULL_AND_PIECEWISE"


def test_speculative_decoding_is_refused(checkpoint: Callable[[str], Checkpoint]) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from model_runner.vllm.limits import require_served

    speculation = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    options = {"dtype": "float32", "skip_tokenizer_init": True, "max_model_len": 64}
    engine = EngineArgs(str(checkpoint("olmoe").path), speculative_config=speculation, **options)
    config = engine.create_engine_config()
    with pytest.raises(UnsupportedModel, match="--speculative-config"):
        require_served(config)


@pytest.mark.parametrize(
    ("named", "settings"),
    [
        (
            "CUDA graphs: take --enforce-eager",
            {"device_config.device_type": "cuda", "compilation_config.cudagraph_mode": FULL},
        ),
        ("--enable-eplb", {"parallel_config.enable_eplb": True}),
        ("--data-parallel-size", {"parallel_config.data_parallel_size": 2}),
        ("--pipeline-parallel-size", {"parallel_config.pipeline_parallel_size": 2}),
        ("--api-server-count", {"parallel_config._api_process_count": 2}),
    ],
)
def test_a_setting_of_other_machines_is_refused(
    named: str, settings: dict[str, Any], checkpoint: Callable[[str], Checkpoint]
) -> None:
    from vllm.config import CUDAGraphMode
    from vllm.engine.arg_utils import EngineArgs

    from model_runner.vllm.limits import require_served

    options = {"dtype": "float32", "skip_tokenizer_init": True, "max_model_len": 64}
    config = EngineArgs(str(checkpoint("olmoe").path), **options).create_engine_config()
    require_served(config)
    for place, value in settings.items():
        section, name = place.split(".")
        setattr(getattr(config, section), name, CUDAGraphMode[FULL] if value is FULL else value)
    with pytest.raises(UnsupportedModel, match=named):
        require_served(config)
