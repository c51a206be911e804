"""The three model families of one size: OLMoE, Qwen3-MoE and GPT-OSS, 4 layers of 16 experts, 4 per token.

They differ in what a routing memory meets: OLMoE weighs the chosen experts by the softmax over all,
Qwen3-MoE makes those weights sum to one, GPT-OSS adds a bias to the router and takes the softmax over
the chosen; it alternates sliding and full attention and has biases and a clamped gate in its experts.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from examples.small_moe.token_streams import END_OF_TEXT_ID
from examples.small_moe.training_experts import PADDED_EXPERTS, register_padded_experts

VOCABULARY_SIZE = 4096
AUXILIARY_LOSS_COEFFICIENT = 0.02
GATE_STD = 0.05

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "router_aux_loss_coef": AUXILIARY_LOSS_COEFFICIENT,
    "initializer_range": 0.04,
    "bos_token_id": None,
    "eos_token_id": END_OF_TEXT_ID,
    "pad_token_id": END_OF_TEXT_ID,
}


def _olmoe() -> OlmoeConfig:
    return OlmoeConfig(intermediate_size=128, num_experts=16, norm_topk_prob=False, **_COMMON)


def _qwen3_moe() -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        intermediate_size=128,
        moe_intermediate_size=128,
        num_experts=16,
        head_dim=32,
        norm_topk_prob=True,
        **_COMMON,
    )


def _gpt_oss() -> GptOssConfig:
    return GptOssConfig(
        intermediate_size=128,
        num_local_experts=16,
        head_dim=32,
        sliding_window=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **_COMMON,
    )


_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "olmoe": _olmoe,
    "qwen3_moe": _qwen3_moe,
    "gpt_oss": _gpt_oss,
}
FAMILIES = tuple(_CONFIGS)
"""The model types that `new_model` makes."""


def model_config(family: str = "olmoe") -> PreTrainedConfig:
    """Return the configuration of one of `FAMILIES`: 3.9 M to 4.0 M parameters."""
    return _CONFIGS[family]()


def new_model(seed: int, family: str = "olmoe") -> PreTrainedModel:
    """Build a fresh float32 model; its routers start wide so that experts part early."""
    torch.manual_seed(seed)
    register_padded_experts()
    config = model_config(family)
    config._experts_implementation = PADDED_EXPERTS
    config._attn_implementation = "eager"
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    for layer in model.model.layers:
        torch.nn.init.normal_(_router(layer.mlp).weight, std=GATE_STD)
    return model


def _router(block: torch.nn.Module) -> Any:
    return block.gate if hasattr(block, "gate") else block.router
