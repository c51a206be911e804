"""What a memory is not served with: refused by name at the start, since it was not tested."""

from __future__ import annotations

from typing import Any

import vllm

from model_runner.errors import UnsupportedModel

# Each minor version of vLLM moves what the plug-in stands on.
TESTED_VLLM = "0.32."


def require_served(vllm_config: Any) -> None:
    """Raises UnsupportedModel naming every setting of a server that a memory does not go with, and its remedy."""
    found = [what for what, there in _limits(vllm_config) if there]
    if found:
        raise UnsupportedModel("knn_moe: a routing memory is not served with " + "; ".join(found))


def _limits(vllm_config: Any) -> list[tuple[str, bool]]:
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    return [
        (
            f"vLLM {vllm.__version__}: install 'vllm>=0.32,<0.33'",
            not vllm.__version__.startswith(TESTED_VLLM),
        ),
        (
            "the V2 model runner: set VLLM_USE_V2_MODEL_RUNNER=0",
            bool(vllm_config.use_v2_model_runner),
        ),
        (
            f"runner {model.runner_type!r}: it serves generation only",
            model.runner_type != "generate",
        ),
        ("expert parallelism (--enable-expert-parallel)", parallel.enable_expert_parallel),
        ("expert load balancing (--enable-eplb)", parallel.enable_eplb),
        ("data parallelism (--data-parallel-size)", parallel.data_parallel_size > 1),
        ("pipeline parallelism (--pipeline-parallel-size)", parallel.pipeline_parallel_size > 1),
        (
            "context parallelism (--prefill-context-parallel-size, --decode-context-parallel-size)",
            max(parallel.prefill_context_parallel_size, parallel.decode_context_parallel_size) > 1,
        ),
        ("overlapped micro-batches (--enable-dbo)", parallel.use_ubatching),
        ("LoRA adapters (--enable-lora)", vllm_config.lora_config is not None),
        (
            "speculative decoding (--speculative-config)",
            vllm_config.speculative_config is not None,
        ),
        ("several API servers (--api-server-count)", parallel._api_process_count > 1),
        ("a multimodal model", model.is_multimodal_model),
        # A replay runs no Python: it would leave the memory out without a word.
        (
            'CUDA graphs: take --enforce-eager, or --compilation-config \'{"cudagraph_mode": "NONE"}\'',
            vllm_config.device_config.device_type != "cpu"
            and vllm_config.compilation_config.cudagraph_mode.name != "NONE",
        ),
    ]
