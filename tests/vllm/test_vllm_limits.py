"""What a memory is not served with is refused by name: settings that cannot be started on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from model_runner.errors import UnsupportedModel
from tests.vllm.models import Checkpoint

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")

WHOLE = ("FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE")


def graphs(cudagraph_mode: str = "PIECEWISE", **options: Any) -> dict[str, Any]:
    """Settings of a server with CUDA graphs, which vLLM compiles unless `options` say otherwise."""
    compilation = {"mode": 3, "cudagraph_mode": cudagraph_mode} | options
    placed = {f"compilation_config.{name}": value for name, value in compilation.items()}
    return {"device_config.device_type": "cuda"} | placed


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
        *((f"{mode}.: take .*cudagraph_mode.: .PIECEWISE", graphs(mode)) for mode in WHOLE),
        ("use_inductor", graphs(use_inductor_graph_partition=True)),
        ("does not compile .mode NONE", graphs(mode=0)),
        ("--enable-eplb", {"parallel_config.enable_eplb": True}),
        ("--data-parallel-size", {"parallel_config.data_parallel_size": 2}),
        ("--pipeline-parallel-size", {"parallel_config.pipeline_parallel_size": 2}),
        ("--kv-transfer-config", {"kv_transfer_config": object()}),
        ("--api-server-count", {"parallel_config._api_process_count": 2}),
    ],
)
def test_a_setting_of_other_machines_is_refused(
    named: str, settings: dict[str, Any], checkpoint: Callable[[str], Checkpoint]
) -> None:
    from model_runner.vllm.limits import require_served

    config = configured(checkpoint("olmoe"), {})
    require_served(config)
    with pytest.raises(UnsupportedModel, match=named):
        require_served(configured(checkpoint("olmoe"), settings))


def test_graphs_that_break_while_they_are_captured_are_refused(
    checkpoint: Callable[[str], Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    from model_runner.vllm.limits import require_served

    config = configured(checkpoint("olmoe"), graphs())
    require_served(config)
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    with pytest.raises(UnsupportedModel, match="VLLM_USE_BREAKABLE_CUDAGRAPH=0"):
        require_served(config)


def configured(model: Checkpoint, settings: dict[str, Any]) -> Any:
    """vLLM's configuration, with settings that it would not take on a CPU."""
    from vllm.config import CompilationMode, CUDAGraphMode
    from vllm.engine.arg_utils import EngineArgs

    options = {"dtype": "float32", "skip_tokenizer_init": True, "max_model_len": 64}
    config = EngineArgs(str(model.path), **options).create_engine_config()
    kinds: dict[str, Any] = {"cudagraph_mode": CUDAGraphMode.__getitem__, "mode": CompilationMode}
    for place, value in settings.items():
        *section, name = place.split(".")
        owner = getattr(config, section[0]) if section else config
        setattr(owner, name, kinds.get(name, lambda given: given)(value))
    return config
