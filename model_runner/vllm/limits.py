"""What a memory is not served with: refused by name at the start, since it was not tested."""

from __future__ import annotations

from typing import Any

import vllm
from vllm.config import CompilationMode

from model_runner.errors import UnsupportedModel
from model_runner.vllm import op

# Each minor version of vLLM moves what the plug-in stands on.
TESTED_VLLM = "0.32."
PIECEWISE = "PIECEWISE"


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
        ("KV caches of others (--kv-transfer-config)", vllm_config.kv_transfer_config is not None),
        ("a multimodal model", model.is_multimodal_model),
        *_graph_limits(vllm_config),
    ]


def _graph_limits(vllm_config: Any) -> list[tuple[str, bool]]:
    """A replay runs no Python: a lookup that is captured would be left out without a word."""
    from vllm.compilation.breakable_cudagraph import is_breakable_cudagraph_enabled

    compilation = vllm_config.compilation_config
    mode = compilation.cudagraph_mode.name
    captured = vllm_config.device_config.device_type != "cpu" and mode != "NONE"
    return [
        (
            f"CUDA graphs of a whole model (cudagraph_mode {mode}): take --compilation-config "
            f'\'{{"cudagraph_mode": "{PIECEWISE}"}}\', or --enforce-eager',
            captured and mode != PIECEWISE,
        ),
        (
            "graphs that Inductor cuts (use_inductor_graph_partition): leave it to vLLM's default, false",
            captured and bool(compilation.use_inductor_graph_partition),
        ),
        (
            "graphs that are cut while they are captured: set VLLM_USE_BREAKABLE_CUDAGRAPH=0",
            captured and is_breakable_cudagraph_enabled(),
        ),
        (
            f"piecewise CUDA graphs of a model that vLLM does not compile (mode {compilation.mode.name}): take "
            "--compilation-config '{\"mode\": 3}', or --enforce-eager",
            captured and mode == PIECEWISE and compilation.mode != CompilationMode.VLLM_COMPILE,
        ),
    ]


def cut_at_lookups(compilation: Any) -> None:
    """The compiler cuts a model at each lookup, which then runs between two replays, as it does at attention.

    Of vLLM 0.32: compilation/partition_rules.py:14 takes any operation of torch.library by its name,
    compilation/backends.py:557 cuts in the order of the graph before anything is made functional, so that what is
    written in place stays so, and :1206 compiles and captures what lies between. The list is filled by
    config/compilation.py:1155 in the front end, attention's operations first; vLLM adds to it itself while it makes a
    model (models/bailing_moe_v3.py:761), which is before it compiles one.
    """
    if compilation.cudagraph_mode.name == PIECEWISE and op.NAME not in compilation.splitting_ops:
        compilation.splitting_ops.append(op.NAME)
