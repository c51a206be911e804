"""Tiny random models of every Mixture-of-Experts causal LM of transformers.

    from tests.families import FAMILIES, tiny_model
    model = tiny_model("olmoe")

About 4 layers, hidden size 32, 8 experts, top-2, a vocabulary of 64. The weights are random but
seeded, and every bias and correction buffer is non-zero, so that each family's whole routing
formula matters.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 64
# What rounding grows with: the vocabulary is no longer than the widest layer, and gemma4_text has two layers more.
LONGEST_SUM, MOST_LAYERS = 64, 6

_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "d_model": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "num_hidden_layers": 4,
    "n_layers": 4,
    "num_attention_heads": 4,
    "n_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "sliding_window": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "qk_head_dim": 16,
}

_LATENT_ATTENTION: dict[str, Any] = {"head_dim": 8, "num_key_value_heads": 4}
_LINEAR_THEN_FULL = ["full_attention", "linear_attention", "linear_attention", "full_attention"]
_SMALL_LINEAR_ATTENTION: dict[str, Any] = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_INKLING: dict[str, Any] = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "unpadded_vocab_size": VOCABULARY,
    "sliding_window_size": 16,
    "rel_extent": 32,
}

_OVERRIDES: dict[str, dict[str, Any]] = {
    "axk1": _LATENT_ATTENTION,
    "axk2": _LATENT_ATTENTION,
    "deepseek_v2": _LATENT_ATTENTION,
    "deepseek_v3": _LATENT_ATTENTION,
    "deepseek_v32": _LATENT_ATTENTION,
    "dots3_note_text": _LATENT_ATTENTION
    | {
        "index_topk": 8,
        "index_head_dim": 8,
        "index_n_heads": 2,
        "shared_experts_intermediate_size": 24,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "glm4_moe_lite": _LATENT_ATTENTION,
    "glm_moe_dsa": _LATENT_ATTENTION,
    "mistral4": _LATENT_ATTENTION | {"head_dim": 16},
    "bailing_hybrid": _LATENT_ATTENTION | {"layer_types": _LINEAR_THEN_FULL},
    "kimi_linear": _LATENT_ATTENTION
    | {"layer_types": _LINEAR_THEN_FULL, "linear_head_dim": 8, "linear_num_heads": 4},
    "longcat_flash": _LATENT_ATTENTION
    | {
        "num_layers": 2,
        "zero_expert_num": 2,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 24,
    },
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "nemotron_h": {
        "ssm_state_size": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "moe_shared_expert_intermediate_size": 24,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
    },
    "qwen3_next": _SMALL_LINEAR_ATTENTION,
    "qwen3_5_moe_text": _SMALL_LINEAR_ATTENTION,
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "granitemoehybrid": {
        "mamba_n_heads": 8,
        "mamba_d_state": 8,
        "layer_types": ["mamba", "attention", "mamba", "attention"],
        "shared_intermediate_size": 24,
    },
    "gemma4_text": {
        "num_hidden_layers": 6,
        "enable_moe_block": True,
        "hidden_size_per_layer_input": 0,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    },
    "laguna": {"moe_router_logit_softcapping": 1.0},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "dbrx": {
        "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {
            "hidden_size": 32,
            "ffn_hidden_size": 24,
            "moe_num_experts": 8,
            "moe_top_k": 2,
        },
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "inkling_text": _INKLING
    | {
        "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding", "hybrid"],
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "n_shared_experts": 2,
    },
    "inkling2_text": _INKLING | {"n_layers_per_attn_res_block": 2},
    "qwen4_exp_text": _SMALL_LINEAR_ATTENTION
    | {
        "hc_count": 2,
        "hc_lowrank": 8,
        "ple_layer_ids": [],
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
}

# Families that transformers does not map to a causal LM class.
_CLASSES = {"mistral4": "Mistral4ForCausalLM"}

FAMILIES: tuple[str, ...] = (
    "afmoe",
    "aria_text",
    "axk1",
    "axk2",
    "bailing_hybrid",
    "beam",
    "cohere2_moe",
    "dbrx",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "deepseek_v4",
    "dots1",
    "dots3_note_text",
    "ernie4_5_moe",
    "exaone_moe",
    "flex_olmo",
    "flint",
    "gemma4_text",
    "glm4_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "gpt_oss",
    "granitemoe",
    "granitemoe_swa",
    "granitemoehybrid",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "hy_v3",
    "hy_v4",
    "inkling2_text",
    "inkling_text",
    "jamba",
    "jetmoe",
    "kimi_linear",
    "kolibri1",
    "laguna",
    "lfm2_moe",
    "llama4_text",
    "longcat_flash",
    "mellum",
    "mimo_v2_flash",
    "minimax",
    "minimax_m2",
    "minimax_m3_vl_text",
    "mistral4",
    "mixtral",
    "nemotron_h",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_5_moe_text",
    "qwen3_moe",
    "qwen3_next",
    "qwen4_exp_text",
    "solar_open",
    "zaya",
)
"""Model types that the hooks serve."""

_SINCE = {
    "aria_text": "5.18",
    "hy_v4": "5.17",
    "kimi_linear": "5.17",
    "bailing_hybrid": "5.20",
    "kolibri1": "5.20",
    "beam": "5.21",
    "flint": "5.21",
    "dots3_note_text": "5.23",
    "inkling2_text": "5.23",
}
"""The first version of transformers that has a family with a router to hook, where an older one is supported."""

_BF16_SINCE = {"deepseek_v4": "5.20"}
"""The first version of transformers that runs a family in bf16, where an older one is supported."""


def missing(family: str, dtype: torch.dtype = torch.float32) -> str | None:
    """What the installed transformers is too old for, if it is."""
    needed = {family: _SINCE.get(family)}
    if dtype == torch.bfloat16:
        needed[f"{family} in bf16"] = _BF16_SINCE.get(family)
    installed = transformers.__version__
    for what, version in needed.items():
        if version is not None and Version(installed) < Version(version):
            return f"{what} needs transformers {version}, this is {installed}"
    return None


FAMILIES_HERE = tuple(family for family in FAMILIES if missing(family) is None)
"""Those that the installed transformers has."""

CORE_FAMILIES = ("olmoe", "qwen3_moe", "gpt_oss", "mixtral", "deepseek_v3")
"""Softmax, softmax over the chosen k, renormalised fp32 weights, sigmoid with groups and bias."""

UNSERVED = {"doge": "its routing is inlined in the block: no router module"}
"""Model types with experts that the hooks cannot serve, and why."""


def tiny_model(
    family: str, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """A fresh seeded model in eval mode.

    Args:
        family: a model type of `FAMILIES` or `UNSERVED`.
        dtype: the dtype to cast the weights to.
        overrides: configuration fields that replace the tiny defaults.

    Skips the test when the installed transformers is too old for the family.
    """
    if reason := missing(family, dtype):
        pytest.skip(reason)
    transformers.logging.set_verbosity_error()
    model_class = getattr(
        transformers, _CLASSES.get(family) or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = model_class(tiny_config(family, **overrides)).eval()
    _randomize(model)
    return _cast(model, dtype)


@functools.cache
def shared_model(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The same model for every caller in the process: leave it as you found it."""
    return tiny_model(family, dtype)


def tiny_config(family: str, **overrides: Any) -> Any:
    """The configuration of `tiny_model`."""
    config_class = CONFIG_MAPPING[family] if family != "mistral4" else transformers.Mistral4Config
    fields = {name for cls in config_class.__mro__ for name in getattr(cls, "__annotations__", {})}
    common = {name: value for name, value in _COMMON.items() if name in fields}
    return config_class(**(common | _OVERRIDES.get(family, {}) | overrides))


def prompt(batch: int = 2, length: int = 6, seed: int = 3) -> torch.Tensor:
    """Random token ids `[batch, length]` without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """As `from_pretrained(dtype=...)` casts: some routers stay in fp32."""
    kept = [re.escape(pattern) for pattern in model._keep_in_fp32_modules_strict or ()]
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        if tensor.is_floating_point() and not re.search(rf"(^|\.)({'|'.join(kept)})(\.|$)", name):
            tensor.data = tensor.data.to(dtype)
    return model


@torch.no_grad()
def _randomize(model: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(1)

    def noise(like: torch.Tensor, deviation: float) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator) * deviation

    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            parameter.copy_(noise(parameter, 0.08))
        elif "bias" in name:
            parameter.copy_(noise(parameter, 0.02))
        elif "per_expert_scale" in name:
            parameter.add_(noise(parameter, 0.1))
    for name, buffer in model.named_buffers():
        if "bias" in name:
            buffer.add_(noise(buffer, 0.05))
        elif "tid2eid" in name:  # deepseek_v4's table from token ids to experts
            order = torch.rand(buffer.shape[0], 8, generator=generator).argsort(-1)
            buffer.copy_(order[:, : buffer.shape[1]])
